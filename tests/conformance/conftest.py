"""Lets transformers' own tests run with ours: their markers are known, and the listed exceptions must fail."""

from __future__ import annotations

import pytest

from conformance.exceptions import EXCEPTIONS
from conformance.upstream import MARKERS


def pytest_configure(config: pytest.Config) -> None:
    for name in MARKERS:
        config.addinivalue_line("markers", f"{name}: of transformers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if reason := _exception(item):
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
    classes = {item.cls.__name__: item.cls for item in items if item.cls}
    for class_name, test in (name.split("::") for name in EXCEPTIONS):
        if class_name in classes and not hasattr(classes[class_name], test):
            raise pytest.UsageError(f"exceptions.py lists {class_name}::{test}, which transformers no longer has")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    if report.when == "call" and report.skipped and not hasattr(report, "wasxfail") and _exception(item):
        report.outcome, report.longrepr = "failed", f"{item.name} is listed as an exception but skips itself"
    return report


def _exception(item: pytest.Item) -> str | None:
    return EXCEPTIONS.get("::".join(item.nodeid.split("::")[1:]))
