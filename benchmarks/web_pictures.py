"""Makes the pictures of docs/web.md from a running page: `python -m benchmarks.web_pictures http://127.0.0.1:7860`.

The page must have the model `tiny-regions`. Needs playwright and Chromium.
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"
SIZES = {
    "light": {"viewport": {"width": 1280, "height": 900}},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}},
}
COLOURS = 128  # of a picture; the page has few


def fill(page: Page, compare: bool) -> None:
    """Asks about an example, at one budget or two, and explains a token."""
    page.get_by_role("button", name="what number is in").click()
    page.locator(".stage svg").wait_for()
    if compare:
        page.get_by_label("Compare with a second budget").check()
        page.get_by_label("number input for Second scale factor").fill("4")
        page.get_by_label("number input for Second scale factor").press("Tab")
        page.get_by_text("instead of 725").nth(1).wait_for()
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_text("first token after").nth(1 if compare else 0).wait_for()
    page.get_by_role("button", name="Ask", exact=True).wait_for()
    box = page.locator(".stage svg").bounding_box()
    assert box is not None
    page.locator(".stage svg").click(position={"x": 0.62 * box["width"], "y": 0.12 * box["height"]})
    page.locator(".token img").wait_for()
    page.mouse.move(0, 0)
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(500)


def main(address: str) -> None:
    """Writes web-light.png, web-dark.png and web-phone.png."""
    PICTURES.mkdir(exist_ok=True)
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, options in SIZES.items():
            page = browser.new_context(**options).new_page()
            page.goto(address)
            fill(page, compare=name != "phone")
            shot = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
            shot.quantize(COLOURS).save(PICTURES / f"web-{name}.png", optimize=True)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
