"""Models saved by version 0.1.0, when the projector was called `projector`, load as before."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from tokenpacker.hf import TokenPackerConfig, carried_model_path
from tokenpacker.hub import carried_models

# config.json and processor_config.json as 0.1.0 wrote them; the weights have only changed their names since.
OLD_FILES = Path(__file__).parent / "saved_by_0_1_0"


@pytest.fixture(params=["tiny", "tiny-mlp", "tiny-regions"])
def folders(request, tmp_path):
    """The carried model, and the same as 0.1.0 saved it."""
    now = carried_model_path(request.param)
    for path in now.iterdir():
        if path.suffix in (".json", ".jinja"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    for path in (OLD_FILES / request.param).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(now / "model.safetensors")
    old = {name.replace(".multi_modal_projector.", ".projector."): tensor for name, tensor in weights.items()}
    assert set(old) != set(weights)
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return now, tmp_path


@pytest.mark.parametrize("auto_class", [AutoModelForImageTextToText, AutoModel])
def test_every_weight_of_an_old_model_is_found(folders, auto_class):
    now, old = folders
    loaded, report = auto_class.from_pretrained(old, output_loading_info=True)
    assert not report["missing_keys"]
    assert not [name for name in report["unexpected_keys"] if not name.startswith("lm_head")]
    expected = auto_class.from_pretrained(now).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_an_old_model_is_saved_under_the_new_names(folders, tmp_path):
    _, old = folders
    AutoModelForImageTextToText.from_pretrained(old).save_pretrained(tmp_path / "again")
    names = load_file(tmp_path / "again" / "model.safetensors")
    assert any(name.startswith("model.multi_modal_projector.") for name in names)
    assert not any(".projector." in name for name in names)


def test_old_configs_and_processors_mean_the_same(folders):
    now, old = folders
    config = TokenPackerConfig.from_pretrained(old)
    assert config.projector == TokenPackerConfig.from_pretrained(now).projector
    assert config.projector_config == config.multi_modal_projector_config
    processors = [AutoProcessor.from_pretrained(folder) for folder in (old, now)]
    sizes = [(336, 336), (500, 300)]
    counts = [[processor.image_layout(size).num_tokens for size in sizes] for processor in processors]
    assert counts[0] == counts[1]


def test_carried_weights_are_stored_in_16_bits_and_are_small():
    for name in carried_models():
        path = carried_model_path(name) / "model.safetensors"
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
        assert path.stat().st_size < 5_000_000


def test_the_projectors_config_goes_by_one_name():
    with pytest.raises(ValueError, match="short name of multi_modal_projector_config; pass one of the two"):
        TokenPackerConfig(projector_config={"name": "mlp"}, multi_modal_projector_config={"name": "mlp"})
