"""What every registered projector promises; a new one is tested by being registered."""

import dataclasses

import pytest
import torch

from tokenpacker import VisionFeatures
from tokenpacker.projectors import available, build, config_from_dict

WIDTHS = {"vision_dim": 16, "language_dim": 24, "num_levels": 3}
GRID = (6, 6)


@pytest.fixture(params=available())
def projector(request):
    return build({"name": request.param, **WIDTHS})


def features(grid=GRID, num_tiles=2, dtype=torch.float32):
    length = grid[0] * grid[1]
    query = torch.randn(num_tiles, length, 16, dtype=dtype)
    return VisionFeatures(query, torch.randn(num_tiles, length, 48, dtype=dtype), grid)


def test_the_config_counts_what_the_module_gives(projector):
    assert projector(features()).shape == (2, projector.config.num_tokens(GRID), 24)


def test_the_config_survives_its_dict(projector):
    assert config_from_dict(projector.config.to_dict()) == projector.config


def test_the_loss_reaches_every_parameter(projector):
    projector(features()).square().mean().backward()
    unreached = [name for name, parameter in projector.named_parameters() if parameter.grad is None]
    assert unreached == []


def test_tiles_do_not_influence_each_other(projector):
    inputs = features(num_tiles=3)
    alone = VisionFeatures(inputs.query[1:2], inputs.levels[1:2], GRID)
    torch.testing.assert_close(projector(inputs)[1:2], projector(alone), atol=1e-6, rtol=1e-5)


def test_bfloat16_goes_in_and_out(projector):
    assert projector.bfloat16()(features(dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_it_compiles_without_graph_breaks(projector):
    inputs = features()
    compiled = torch.compile(projector, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs), projector(inputs), atol=1e-5, rtol=1e-5)


def test_weights_saved_and_loaded_give_the_same(projector, tmp_path):
    torch.save(projector.state_dict(), tmp_path / "weights.pt")
    again = build(projector.config)
    again.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    inputs = features()
    assert torch.equal(again(inputs), projector(inputs))


def test_features_of_other_widths_are_refused(projector):
    narrow = VisionFeatures(torch.randn(1, 36, 8), torch.randn(1, 36, 24), GRID)
    with pytest.raises(ValueError, match="vision_dim=8"):
        projector(narrow)


def test_the_config_is_frozen(projector):
    with pytest.raises(dataclasses.FrozenInstanceError):
        projector.config.vision_dim = 3
