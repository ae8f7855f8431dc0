"""A projector keeps its config in its file, and a file of something else is named."""

import pytest
import torch
from safetensors.torch import save_file

from tokenpacker.projectors import Mlp, MlpConfig, TokenPacker, TokenPackerProjectorConfig, load, save


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "projector",
    [
        TokenPacker(TokenPackerProjectorConfig(vision_dim=16, language_dim=24, num_levels=2, num_heads=4)),
        Mlp(MlpConfig(vision_dim=16, language_dim=24)),
    ],
    ids=lambda projector: projector.config.name,
)
def test_a_projector_comes_back_as_it_was(projector, dtype, tmp_path):
    projector = projector.to(dtype)
    save(projector.config, projector.state_dict(), tmp_path / "projector.safetensors")
    loaded = load(tmp_path / "projector.safetensors")
    assert loaded.config == projector.config
    assert all(tensor.equal(loaded.state_dict()[name]) for name, tensor in projector.state_dict().items())
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}


def test_files_of_something_else_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        load(tmp_path / "missing.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(ValueError, match="cannot be read"):
        load(tmp_path / "text.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no projector of this package"):
        load(tmp_path / "other.safetensors")
    config = MlpConfig(vision_dim=16, language_dim=24)
    save(config, {"weight": torch.zeros(2)}, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match="are not those of its config"):
        load(tmp_path / "wrong.safetensors")
