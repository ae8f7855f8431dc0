"""What pyproject.toml, the locks and docs/compatibility.md say about versions is one and the same."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
LOCKS = {"lock": "requirements.lock", "5.19": "locks/5.19.lock", "floor": "locks/floor.lock"}
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
RUN_HIGHER = {"torch"}  # every lock holds the one build that is run; the page says what is known of older ones


def read_project() -> dict:
    tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


PROJECT = read_project()
NEEDED = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = [Requirement(line) for lines in PROJECT["optional-dependencies"].values() for line in lines]
(TRANSFORMERS,) = (requirement for requirement in NEEDED if requirement.name == "transformers")


def pinned(lock: str, python: str = "3.11") -> dict[str, Version]:
    """The version of every package that a lock holds for a Python on Linux."""
    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    environment |= {"platform_system": "Linux", "platform_machine": "x86_64"}
    versions: dict[str, Version] = {}
    for line in (ROOT / LOCKS[lock]).read_text().splitlines():
        if line.lstrip().startswith("#"):
            continue
        requirement = Requirement(line)  # a URL or a path is none
        if requirement.marker is None or requirement.marker.evaluate(environment):
            assert requirement.name not in versions, line
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", line
            versions[requirement.name] = Version(specifier.version)
    return versions


def bound(requirement: Requirement, operator: str) -> Version:
    (version,) = (part.version for part in requirement.specifier if part.operator == operator)
    return Version(version)


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_holds_a_fitting_version_of_every_dependency(lock, python):
    versions = pinned(lock, python)
    for requirement in [*NEEDED, *EXTRAS]:
        if requirement.name != PROJECT["name"]:
            assert requirement.specifier.contains(versions[requirement.name]), requirement


def test_the_lock_names_all_that_is_reached_from_the_package():
    versions, reached, ahead = pinned("lock", f"{sys.version_info[0]}.{sys.version_info[1]}"), set(), [*NEEDED, *EXTRAS]
    if importlib.metadata.version("transformers") != str(versions["transformers"]):
        pytest.skip("what is installed is not what the lock holds")
    while ahead:
        requirement = ahead.pop()
        name = canonicalize_name(requirement.name)
        key = (name, *sorted(requirement.extras))
        if name == PROJECT["name"] or key in reached:
            continue
        reached.add(key)
        assert name in versions, f"{name} is not in the lock; run `make lock`"
        extras = ("", *requirement.extras)
        try:
            lines = [Requirement(line) for line in importlib.metadata.requires(name) or ()]
        except importlib.metadata.PackageNotFoundError:
            continue  # a tool that is not installed here: what it needs cannot be read
        ahead += [it for it in lines if it.marker is None or any(it.marker.evaluate({"extra": e}) for e in extras)]


def test_the_floor_holds_the_lower_bounds():
    versions = pinned("floor")
    for requirement in NEEDED:
        if requirement.name not in RUN_HIGHER:
            assert versions[requirement.name] == bound(requirement, ">="), requirement


def test_transformers_is_capped_at_the_newest_minor_that_was_run():
    newest = pinned("lock")["transformers"]
    assert bound(TRANSFORMERS, "<") == Version(f"{newest.major}.{newest.minor + 1}")


def test_the_page_says_what_the_locks_hold():
    page = (ROOT / "docs" / "compatibility.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    assert {"`transformers`", "`torch`"} <= {row[0] for row in rows}
    ranges = {requirement.name: requirement.specifier for requirement in [*EXTRAS, *NEEDED]}
    held = [pinned("floor"), pinned("5.19"), pinned("lock"), pinned("lock", "3.10")]
    for name, specifier, *versions in rows:
        package = name.strip("`")
        assert SpecifierSet(specifier) == ranges[package], package
        assert [Version(version) for version in versions] == [lock[package] for lock in held], package
