import pytest
import torch

from tokenpacker.carried import recipes
from tokenpacker.carried import tiny as train_module
from tokenpacker.carried.card import add_accuracies
from tokenpacker.carried.tiny import train_tiny
from tokenpacker.train.run_folder import HISTORY


def test_an_unknown_projector_names_the_valid_ones():
    with pytest.raises(ValueError, match="use one of token-packer, mlp"):
        recipes.tiny("resampler")


def test_without_accelerate_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'tokenpacker\[train\]'"):
        train_tiny(tmp_path)


def test_a_fraction_outside_its_range_is_refused(tmp_path):
    with pytest.raises(ValueError, match="steps_fraction=0"):
        train_tiny(tmp_path, steps_fraction=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    pytest.importorskip("easy_vqa", reason="the easy-vqa package is not installed")
    folder = tmp_path_factory.mktemp("tiny")
    return train_tiny(folder / "packer", steps_fraction=0.0005, foundation_dir=folder / "foundation")


@pytest.mark.slow
def test_training_leaves_a_model_that_answers(trained):
    from PIL import Image

    from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor

    model = TokenPackerForConditionalGeneration.from_pretrained(trained)
    processor = TokenPackerProcessor.from_pretrained(trained)
    inputs = processor(images=Image.new("RGB", (64, 64)), text="<s>USER: <image>\nhi ASSISTANT:", return_tensors="pt")
    for scale_factor in (2, 3, 4):
        inputs = processor(
            images=Image.new("RGB", (64, 64)), text="<image> hi", return_tensors="pt", scale_factor=scale_factor
        )
        assert model.generate(**inputs, scale_factor=scale_factor, max_new_tokens=2).shape[0] == 1
    assert model.dtype == torch.float32
    assert all(torch.equal(parameter, parameter.half().float()) for parameter in model.parameters())


@pytest.mark.slow
def test_a_finished_training_is_not_repeated(trained):
    before = (trained / "state" / "instruct" / HISTORY).stat().st_mtime_ns
    train_tiny(trained, steps_fraction=0.0005, foundation_dir=trained.parent / "foundation")
    assert (trained / "state" / "instruct" / HISTORY).stat().st_mtime_ns == before


@pytest.mark.slow
def test_the_card_tells_command_phases_and_measured_accuracies(trained):
    add_accuracies(
        trained, [{"task": "easy-vqa", "scale_factor": 2, "correct": 97, "questions": 100, "image_tokens": 37.0}]
    )
    card = (trained / "README.md").read_text()
    assert "tokenpacker train tiny --output runs/tiny\n" in card
    assert "| easy-vqa | 2 | 97 / 100 | 97.00 % | 37 |" in card
    assert "stage 2" in card
    assert str(trained) not in (trained / "config.json").read_text()
