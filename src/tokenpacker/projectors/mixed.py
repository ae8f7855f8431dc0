"""Packs tiles that have different scale factors.

Shapes: U tiles with features, N packed tiles, T packed tokens of a tile, D language width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenpacker.features import VisionFeatures
from tokenpacker.projectors.base import Projector


def pack_tiles(
    projector: Projector,
    features: VisionFeatures,
    scale_factors: int | Sequence[int] | None = None,
    tile_index: Tensor | None = None,
) -> Tensor | list[Tensor]:
    """Returns packed tokens (N, T, D); a list of N tensors (T, D) if the tiles have different scale factors.

    The projector runs once for each scale factor, on the tiles that have it.

    Args:
        scale_factors: one for all tiles, or one for each of the N; None takes the projector's own.
        tile_index: (N,), the tile of `features` behind each packed tile; None if N = U.

    Raises:
        ValueError: if there are more or fewer scale factors than tiles, or if the projector cannot use one.
    """
    num_tiles = features.query.shape[0] if tile_index is None else tile_index.shape[0]
    if isinstance(scale_factors, Sequence):
        if len(scale_factors) != num_tiles:
            raise ValueError(
                f"{len(scale_factors)} scale factors were given for {num_tiles} tiles; pass one for each tile, as the"
                " processor does"
            )
        different = set(scale_factors)
        if len(different) > 1:
            return _pack_mixed(projector, features, scale_factors, tile_index)
        scale_factors = different.pop() if different else None
    packed = projector(features, scale_factors)  # (U, T, D)
    return packed if tile_index is None else packed[tile_index.to(packed.device)]


def _pack_mixed(
    projector: Projector, features: VisionFeatures, scale_factors: Sequence[int], tile_index: Tensor | None
) -> list[Tensor]:
    factors = torch.tensor(scale_factors)  # (N,)
    tiles = torch.arange(len(factors)) if tile_index is None else tile_index.cpu()
    packed: dict[int, Tensor] = {}
    for factor in sorted(set(scale_factors)):
        places = (factors == factor).nonzero()[:, 0]  # of the tiles with this factor
        shown, row = tiles[places].unique(return_inverse=True)
        tokens = projector(features.select(shown.to(features.query.device)), factor)  # (different tiles, T, D)
        packed |= dict(zip(places.tolist(), tokens[row.to(tokens.device)], strict=True))
    return [packed[place] for place in range(len(factors))]
