"""The load benchmark, as far as it runs without a server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("psutil")
from benchmarks import serving, serving_load

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_the_page_shows_what_was_measured():
    figures = json.loads((DOCS / "serving-benchmark.json").read_text())
    page = (DOCS / "serving.md").read_text(encoding="utf-8")
    shown = page[page.index("<!-- serving:begin -->") : page.index("<!-- serving:end -->")]
    for line in serving.tables(figures):
        assert line in shown


def test_a_good_request_is_about_a_picture_of_its_own_and_a_broken_one_has_no_answer():
    requests = serving_load.make_requests(60, serving.carried_model_path(), "short")
    kinds = {request.kind for request in requests}
    assert kinds == {"good", "bad", "leaves"}
    good = [request for request in requests if request.kind != "bad"]
    urls = {request.body["messages"][0]["content"][0]["image_url"]["url"] for request in good}
    assert len(urls) == len(good)
    assert all(request.expected is not None for request in good)
    assert all(request.expected is None for request in requests if request.kind == "bad")
    assert all(request.body["stream"] for request in requests if request.kind == "leaves")
