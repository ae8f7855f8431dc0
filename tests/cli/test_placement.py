"""`--device` and `--dtype`: where a model goes and in which type."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tokenpacker.cli import loading as models
from tokenpacker.cli.loading import load_model


@pytest.mark.parametrize("device", [None, "cpu", "auto"])
def test_a_model_is_placed_where_it_is_wanted(tiny_model_dir, device):
    model, _ = load_model(str(tiny_model_dir), device=device)
    expected = "cuda" if torch.cuda.is_available() and device != "cpu" else "cpu"
    assert {parameter.device.type for parameter in model.parameters()} == {expected}


def test_a_type_is_given_to_all_weights(tiny_model_dir):
    model, _ = load_model(str(tiny_model_dir), device="cpu", dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "--device gpu is unknown; use one of cpu, cuda, mps, auto, or cuda:1"),
        ({"device": "cuda:x"}, "--device cuda:x is unknown"),
        ({"device": "cuda:77"}, "--device cuda:77 is not there"),
    ],
)
def test_what_is_not_to_be_had_is_told(tiny_model_dir, options, message):
    with pytest.raises(ValueError, match=message):
        load_model(str(tiny_model_dir), **options)


def test_four_bits_need_a_library(tiny_model_dir, monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="--dtype 4bit needs bitsandbytes; run: pip install bitsandbytes"):
        load_model(str(tiny_model_dir), dtype="4bit")


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="--dtype 4bit needs bitsandbytes")
def test_four_bits_are_for_the_language_model_only(make_complete, tmp_path):
    from tokenpacker.checkpoints import convert

    convert(make_complete(), tmp_path / "model")
    model, _ = load_model(str(tmp_path / "model"), device="cpu", dtype="4bit")
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    quantised = [name for name, kind in kinds.items() if kind == "Linear4bit"]
    assert quantised
    assert all(name.startswith("model.language_model.layers.") for name in quantised)
