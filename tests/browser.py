"""Headless Chromium for tests of pages, and what every page must hold; a plugin of conftest.py."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

PHONE, DESKTOP = {"width": 360, "height": 640}, {"width": 1280, "height": 800}  # CSS pixels
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
# the visible elements that reach beyond the sides of the window, without those that a parent scrolls
OVERFLOWING = """() => [...document.body.querySelectorAll("*")].filter(element => {
    const box = element.getBoundingClientRect();
    if (!box.width || !box.height || (box.right <= innerWidth + 1 && box.left >= -1)) return false;
    if (!element.checkVisibility({opacityProperty: true, visibilityProperty: true})) return false;
    for (let at = element.parentElement; at !== document.body; at = at.parentElement)
        if (["auto", "scroll"].includes(getComputedStyle(at).overflowX)) return false;
    return true;
}).map(element => element.outerHTML.slice(0, 120))"""


@pytest.fixture(scope="module")
def chromium():
    """Chromium, by playwright; `CHROMIUM` may name its file.

    One for each module and no longer: while playwright's calls are open, `asyncio.run` fails in this thread.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as running:
        found = [os.environ.get("CHROMIUM"), *map(shutil.which, NAMES), running.chromium.executable_path]
        path = next((path for path in found if path and Path(path).is_file()), None)
        if path is None:
            pytest.skip("Chromium is not installed; install it, or name its file in CHROMIUM")
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium):
    """Opens an address in a session of its own: `open_page(url, PHONE, color_scheme="dark")`, or the file of a Path.

    Further arguments are those of playwright's `new_context`. The test fails if a page has logged an error.
    """
    contexts, errors = [], []

    def open_(address: str | Path, viewport: dict[str, int] = DESKTOP, **options):
        contexts.append(chromium.new_context(viewport=viewport, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address.resolve().as_uri() if isinstance(address, Path) else address)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not errors


def assert_fits(page) -> None:
    """Fails if anything reaches beyond the sides of the window, where a reader would have to scroll the page."""
    assert page.evaluate(OVERFLOWING) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth + 1")


def assert_accessible(page) -> None:
    """Fails if axe-core finds what keeps people from using the page (serious or critical)."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    found = axe.Axe().run(page).response["violations"]
    serious = [rule for rule in found if rule["impact"] in ("serious", "critical")]
    assert not serious, [(rule["id"], rule["nodes"][0]["html"], rule["nodes"][0]["failureSummary"]) for rule in serious]
