"""The figures of docs/export.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("psutil")
from benchmarks import export

from tokenpacker.speed.tables import markdown

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_the_page_shows_what_was_measured():
    figures = json.loads((DOCS / "export-benchmark.json").read_text())
    page = (DOCS / "export.md").read_text(encoding="utf-8")
    shown = page[page.index("<!-- export:begin -->") : page.index("<!-- export:end -->")]
    assert "\n".join(markdown(*export.table(figures))) in shown
