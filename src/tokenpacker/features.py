"""Vision features: what a vision encoder gives to a projector.

Shapes: N tiles, (h, w) patch grid, L = h*w patch tokens, M levels, C vision width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree  # where `torch.export` sends those who bring a type of their own


@dataclass  # not frozen: transformers' exporters move tensors in place
class VisionFeatures:
    """Patch tokens of N tiles, without CLS, in row-major order of the patch grid.

    Args:
        query: (N, L, C), the level for coarse queries.
        levels: (N, L, M*C), the levels for keys and values, concatenated on the channel.
        patch_grid: (h, w) with h*w = L.

    Raises:
        ValueError: if a shape, dtype or device does not fit this.
    """

    query: Tensor
    levels: Tensor
    patch_grid: tuple[int, int]

    def __post_init__(self) -> None:
        height, width = self.patch_grid
        for name, tensor in (("query", self.query), ("levels", self.levels)):
            if not isinstance(tensor, Tensor):
                raise ValueError(
                    f"{name} is given as {type(tensor).__name__}; pass a tensor (tiles, patches, channels)"
                )
            if tensor.dim() != 3:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}; expected three dimensions (tiles, patches, channels)"
                )
            if not tensor.is_floating_point():
                raise ValueError(
                    f"{name} has dtype {tensor.dtype}; expected a floating-point type, as the encoder gives it"
                )
            if tensor.shape[1] != height * width:
                raise ValueError(
                    f"{name} has {tensor.shape[1]} patch tokens but patch_grid={height}x{width} needs {height * width};"
                    " drop CLS and register tokens, or correct patch_grid"
                )
        if self.query.shape[0] != self.levels.shape[0]:
            raise ValueError(
                f"query holds {self.query.shape[0]} tiles but levels holds {self.levels.shape[0]}; they must agree"
            )
        if self.levels.shape[2] % self.query.shape[2]:
            raise ValueError(
                f"levels is {self.levels.shape[2]} wide, not a multiple of the query's width {self.query.shape[2]};"
                " concatenate whole levels on the channel"
            )
        if self.query.dtype != self.levels.dtype or self.query.device != self.levels.device:
            raise ValueError(
                f"query is {self.query.dtype} on {self.query.device} but levels is {self.levels.dtype} on"
                f" {self.levels.device}; bring both to one dtype and device"
            )

    @classmethod
    def from_hidden_states(
        cls,
        hidden_states: Sequence[Tensor],
        patch_grid: tuple[int, int],
        levels: Sequence[int] = (12, 16, 22, 23),
        query_level: int | None = None,
        num_prefix_tokens: int = 0,
    ) -> VisionFeatures:
        """Builds features from an encoder's hidden states, each (N, P + L, C) with P prefix tokens before the patches.

        Args:
            levels: indices into `hidden_states`; the default is the paper's for CLIP-L/336.
            query_level: index of the query's level; None means the last of `levels`.
            num_prefix_tokens: P: 0 for SigLIP, 1 for CLIP (CLS), 5 for DINOv2 with registers (CLS and four registers).

        Raises:
            ValueError: if a level does not exist, or if its number of tokens is not P + L.
        """
        height, width = patch_grid
        query_level = levels[-1] if query_level is None else query_level

        def patch_tokens(level: int) -> Tensor:
            if not -len(hidden_states) <= level < len(hidden_states):
                raise ValueError(f"level {level} does not exist; the encoder gave {len(hidden_states)} hidden states")
            tokens = hidden_states[level]
            if tokens.dim() != 3 or tokens.shape[1] != num_prefix_tokens + height * width:
                raise ValueError(
                    f"level {level} has the shape {tuple(tokens.shape)}, but num_prefix_tokens={num_prefix_tokens} and"
                    f" patch_grid={height}x{width} need (tiles, {num_prefix_tokens + height * width}, channels); say in"
                    " num_prefix_tokens how many tokens come before the patches (1 for CLIP's CLS), or correct"
                    " patch_grid"
                )
            return tokens[:, num_prefix_tokens:]

        stacked = torch.cat([patch_tokens(level) for level in levels], dim=-1)
        return cls(patch_tokens(query_level), stacked, patch_grid)

    def to(self, device: torch.device) -> VisionFeatures:
        """Returns these features on a device; a device map may put encoder and projector on two."""
        if self.query.device == device:
            return self
        return VisionFeatures(self.query.to(device), self.levels.to(device), self.patch_grid)

    def select(self, tiles: Tensor) -> VisionFeatures:
        """Returns the features of the tiles with these indices (n,)."""
        return VisionFeatures(self.query[tiles], self.levels[tiles], self.patch_grid)

    @property
    def vision_dim(self) -> int:
        """C, the width of one level."""
        return self.query.shape[2]

    @property
    def num_levels(self) -> int:
        """M, the number of levels in `levels`."""
        return self.levels.shape[2] // self.query.shape[2]


def _flatten(features: VisionFeatures) -> tuple[list[Tensor], list[int]]:
    return [features.query, features.levels], list(features.patch_grid)  # the grid is no input: programs depend on it


def _flatten_with_keys(features: VisionFeatures) -> tuple[list[tuple[Any, Tensor]], list[int]]:
    tensors, grid = _flatten(features)
    return [(pytree.GetAttrKey(name), tensor) for name, tensor in zip(("query", "levels"), tensors, strict=True)], grid


def _unflatten(values: Any, patch_grid: Any) -> VisionFeatures:
    features = object.__new__(VisionFeatures)  # unchecked: tracers put other things than tensors in, too
    vars(features).update(zip(("query", "levels", "patch_grid"), (*values, tuple(patch_grid)), strict=True))
    return features


pytree.register_pytree_node(
    VisionFeatures,
    _flatten,
    _unflatten,
    serialized_type_name="tokenpacker.VisionFeatures",
    flatten_with_keys_fn=_flatten_with_keys,
)
torch.serialization.add_safe_globals([VisionFeatures])  # exported programs are saved with their example inputs
