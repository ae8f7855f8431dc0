"""Lets transformers' own tests run with ours: their markers are known, and the listed exceptions must fail."""

from __future__ import annotations

import pytest

from conformance.exceptions import EXCEPTIONS
from conformance.upstream import MARKERS


def pytest_configure(config: pytest.Config) -> None:
    for name in MARKERS:
        config.addinivalue_line("markers", f"{name}: of transformers")
    config.addinivalue_line("filterwarnings", "default::FutureWarning")


@pytest.fixture(autouse=True)
def no_deprecated_names_of_transformers() -> None:
    """Off, as is the filter: their tests use deprecated names on purpose."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if reason := _exceptions(item).get(item.name):
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
        for name in _exceptions(item):
            if not hasattr(item.cls, name):
                raise pytest.UsageError(f"exceptions.py lists {name}, which {item.cls.__name__} does not have")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and item.name in _exceptions(item):
        report.outcome, report.longrepr = "failed", f"{item.name} is listed as an exception but skips itself"
    return report


def _exceptions(item: pytest.Item) -> dict[str, str]:
    """Those of the item's class and of the classes that it inherits from."""
    listed: dict[str, str] = {}
    for cls in getattr(item.cls, "__mro__", ()):
        listed |= EXCEPTIONS.get(cls.__name__, {})
    return listed
