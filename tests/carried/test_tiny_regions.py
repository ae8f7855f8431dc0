"""The carried model's two region stages: what they train, and that they leave a model that takes masks."""

import json

import numpy as np
import pytest
import torch

from tokenpacker.carried import tiny as train_module
from tokenpacker.carried.card import add_accuracies
from tokenpacker.carried.recipes import find_recipe
from tokenpacker.carried.tiny import train_tiny_regions

FRACTION = 0.0005  # one step of each stage


def test_the_first_stage_trains_the_region_module_alone_and_the_second_all_but_the_encoder():
    first, second = find_recipe("region-tiny"), find_recipe("region-instruct-tiny")
    assert first.train == ("regions",)
    assert second.train == ("projector", "regions", "language_model")
    assert (first.model.start, second.model.start) == ("tiny", "runs/region-tiny/model")
    assert first.data.scenes.regions == 1.0
    assert 0 < second.data.scenes.regions < 1  # what the model knew already must not be lost


def test_a_fraction_outside_its_range_is_refused(tmp_path):
    with pytest.raises(ValueError, match="steps_fraction=2"):
        train_tiny_regions(tmp_path, steps_fraction=2)


def test_a_start_without_a_record_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(ValueError, match=r"holds no training.json; give a folder that `tokenpacker train tiny` wrote"):
        train_tiny_regions(tmp_path / "model", start=tmp_path)


def test_without_accelerate_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'tokenpacker\[train\]'"):
        train_tiny_regions(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    pytest.importorskip("easy_vqa", reason="the easy-vqa package is not installed")
    return train_tiny_regions(tmp_path_factory.mktemp("tiny-regions"), steps_fraction=FRACTION)


@pytest.mark.slow
def test_training_leaves_a_model_that_answers_about_masks_and_without(trained):
    from PIL import Image

    from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor
    from tokenpacker.hub import carried_model_path

    model = TokenPackerForConditionalGeneration.from_pretrained(trained)
    processor = TokenPackerProcessor.from_pretrained(trained)
    mask = np.zeros((64, 64), dtype=bool)
    mask[20:30, 5:40] = True
    plain = {"images": Image.new("RGB", (64, 64)), "return_tensors": "pt"}
    for inputs in (
        processor(text="<s>USER: <image>\nwhat is <mask>? ASSISTANT:", region_masks=[[mask]], **plain),
        processor(text="<s>USER: <image>\nwhat is it? ASSISTANT:", **plain),
    ):
        assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1
    assert all(torch.equal(parameter, parameter.half().float()) for parameter in model.parameters())
    start = TokenPackerForConditionalGeneration.from_pretrained(carried_model_path())
    assert model.get_input_embeddings().weight.shape == start.get_input_embeddings().weight.shape


@pytest.mark.slow
def test_a_finished_training_is_not_repeated(trained):
    finished = [path.stat().st_mtime_ns for path in sorted(trained.glob("state/*/model/model.safetensors"))]
    train_tiny_regions(trained, steps_fraction=FRACTION)
    again = [path.stat().st_mtime_ns for path in sorted(trained.glob("state/*/model/model.safetensors"))]
    assert len(finished) == 2
    assert finished == again


@pytest.mark.slow
def test_record_and_card_tell_all_phases_and_what_was_measured(trained):
    rows = [{"task": "regions", "scale_factor": 2, "correct": 97, "questions": 100, "image_tokens": 37.0}]
    add_accuracies(trained, rows)
    record = json.loads((trained / "training.json").read_text())
    phases = ["encoder", "language", "align", "instruct", "region-tiny", "region-instruct-tiny"]
    assert list(record["phases"]) == phases
    assert record["regions"]["region-tiny"]["train"] == ["regions"]
    card = (trained / "README.md").read_text()
    assert "tokenpacker train tiny-regions" in card
    assert "| regions | 2 | 97 / 100 | 97.00 % | 37 |" in card
    assert "region stage 3" in card
    assert "/" + str(trained).strip("/").split("/")[0] + "/" not in card + json.dumps(record)  # no path of a machine
