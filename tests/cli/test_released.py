from __future__ import annotations

import pytest

from tokenpacker.released import RELEASED_MODELS


@pytest.mark.parametrize("columns", ["80", "160"])
def test_every_model_stands_in_the_table_with_its_hub_id_unbroken(run, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    shown = run("models").stdout
    for model in RELEASED_MODELS:
        assert (model.hub_id or model.name) in shown
        assert model.facts_from in shown
        assert (model.scores_from or "") in shown
        for benchmark, score in model.scores:
            assert benchmark in shown
            assert (str(score) if isinstance(score, float | int) else "/".join(map(str, score))) in shown


def test_80_columns_suffice(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = run("models").stdout.splitlines()
    assert max(len(line) for line in lines if "Source: " not in line) <= 80
    assert not any("…" in line for line in lines)


def test_json_holds_the_same_models(run_json):
    models = run_json("models")["models"]
    assert [model["hub_id"] for model in models] == [model.hub_id for model in RELEASED_MODELS]
    largest = models[4]
    assert largest["resolution"] == [1344, 1344]
    assert (largest["max_tiles"], largest["tokens_per_tile"], largest["mean_tokens"]) == (16, 144, 1393)
    assert largest["scores"]["OCRB"] == 521
    assert largest["scores"]["MME"] == [1574, 350]
    assert largest["scores_from"] == "https://arxiv.org/abs/2407.02392v4, Table 2"
