from __future__ import annotations

import sys
from types import ModuleType

import pytest


@pytest.fixture
def trained(monkeypatch):
    """Calls of `train_tiny`, which here only notes them; what is measured then is noted in the card."""
    import tokenpacker.carried.card
    import tokenpacker.evaluate

    calls = []
    rows = [{"task": "easy-vqa", "correct": 9, "questions": 10}]
    monkeypatch.setattr(tokenpacker.evaluate, "measure_model", lambda folder: rows)
    monkeypatch.setattr(
        tokenpacker.carried.card, "add_accuracies", lambda folder, rows: calls.append(("card", len(rows)))
    )

    def train_tiny(output_dir, **options):
        calls.append((output_dir.name, options))
        print("a log line of the trainer")
        return output_dir

    module = ModuleType("tokenpacker.carried.tiny")
    module.train_tiny = module.train_tiny_regions = train_tiny
    monkeypatch.setitem(sys.modules, "tokenpacker.carried.tiny", module)
    return calls


def test_the_folder_of_the_model_is_printed(run, trained, tmp_path):
    result = run("train", "tiny", "--output", tmp_path / "model")
    assert result.stdout == f"{tmp_path / 'model'}\n"
    assert trained == [("model", {"projector": "token-packer", "seed": 0, "foundation_dir": None}), ("card", 1)]


def test_options_reach_the_recipe(run_json, trained, tmp_path):
    told = run_json(
        "train", "tiny", "--output", tmp_path / "model", "--projector", "mlp", "--seed", 3, "--foundation", tmp_path
    )
    assert told["accuracies"] == [{"task": "easy-vqa", "correct": 9, "questions": 10}]
    assert (told["model"], told["projector"], told["seed"]) == (str(tmp_path / "model"), "mlp", 3)
    assert trained == [("model", {"projector": "mlp", "seed": 3, "foundation_dir": tmp_path}), ("card", 1)]


def test_the_model_that_takes_regions_is_made_from_the_carried_one_or_another(run, trained, tmp_path):
    result = run("train", "tiny-regions", "--output", tmp_path / "model")
    assert result.stdout == f"{tmp_path / 'model'}\n"
    run("train", "tiny-regions", "--output", tmp_path / "model", "--start", tmp_path, "--seed", 2)
    assert trained[::2] == [("model", {"start": None, "seed": 0}), ("model", {"start": tmp_path, "seed": 2})]


def test_a_projector_without_a_recipe_is_refused(one_line_error, tmp_path):
    message = one_line_error("train", "tiny", "--output", tmp_path / "model", "--projector", "pooling")
    assert "pooling" in message
