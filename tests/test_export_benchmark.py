"""The figures of docs/export.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("psutil")
from benchmarks import export

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_the_page_shows_what_was_measured():
    models = json.loads((DOCS / "export-benchmark.json").read_text())
    page = (DOCS / "export.md").read_text(encoding="utf-8")
    shown = page[page.index("<!-- export:begin -->") : page.index("<!-- export:end -->")]
    for figures in models.values():
        assert "\n".join(export.tables(figures)) in shown
