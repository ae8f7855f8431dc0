"""One projector at several scale factors in one call, against one call per tile."""

import pytest
import torch

from tokenpacker import VisionFeatures
from tokenpacker.projectors import build
from tokenpacker.projectors.base import pack_tiles

DIM, GRID = 16, (6, 6)


@pytest.fixture(scope="module")
def features():
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(5, 36, DIM, generator=generator)
    return VisionFeatures(query, torch.randn(5, 36, 2 * DIM, generator=generator), GRID)


@pytest.fixture(scope="module", params=["token-packer", "average-pool"])
def projector(request):
    fields = {"num_heads": 4} if request.param == "token-packer" else {}
    return build({"name": request.param, "vision_dim": DIM, "language_dim": 8, "num_levels": 2, **fields}).eval()


@pytest.mark.parametrize("tile_index", [None, [3, 0, 0, 4, 1, 3]], ids=["each once", "some twice"])
@pytest.mark.parametrize("factors", [[1, 2, 3, 2, 6, 1], [6, 6, 1, 1, 1, 2], [2] * 6], ids=str)
def test_each_tile_is_packed_as_alone(projector, features, tile_index, factors):
    shown = list(range(5)) if tile_index is None else tile_index
    factors = factors[: len(shown)]
    index = None if tile_index is None else torch.tensor(tile_index)
    packed = pack_tiles(projector, features, factors, index)
    assert len(packed) == len(shown)
    for tokens, tile, factor in zip(packed, shown, factors, strict=True):
        alone = projector(features.select(torch.tensor([tile])), factor)[0]
        torch.testing.assert_close(tokens, alone)


def test_one_scale_factor_gives_one_tensor(projector, features):
    assert torch.equal(pack_tiles(projector, features, [3] * 5), projector(features, 3))
    assert torch.equal(pack_tiles(projector, features, 3), projector(features, 3))
    assert torch.equal(pack_tiles(projector, features), projector(features))


def test_the_gradient_reaches_every_tile(features):
    projector = build({"name": "average-pool", "vision_dim": DIM, "language_dim": 8, "num_levels": 2})
    query = features.query.clone().requires_grad_()
    packed = pack_tiles(projector, VisionFeatures(query, features.levels, GRID), [1, 2, 3, 2, 1])
    torch.cat(packed).sum().backward()
    assert (query.grad.abs().sum(dim=(1, 2)) > 0).all()


def test_a_scale_factor_is_needed_for_each_tile(projector, features):
    with pytest.raises(ValueError, match="3 scale factors were given for 5 tiles; pass one for each tile"):
        pack_tiles(projector, features, [1, 2, 3])
