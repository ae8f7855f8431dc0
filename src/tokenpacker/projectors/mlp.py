"""The MLP projector of LLaVA-1.5: every patch token becomes one token. The full-count baseline.

Shapes: N tiles, (h, w) patch grid, L = h*w, C vision width, D language width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokenpacker.features import VisionFeatures
from tokenpacker.projectors.base import Projector, ProjectorConfig, register
from tokenpacker.projectors.layers import two_linears


@dataclass(frozen=True, kw_only=True)
class MlpConfig(ProjectorConfig):
    """Config of `Mlp`, which reads the query level alone."""

    name: ClassVar[str] = "mlp"

    def token_grid(self, patch_grid: tuple[int, int], scale_factor: int | None = None) -> tuple[int, int]:
        """Returns the patch grid. Raises ValueError for a scale factor other than 1."""
        if scale_factor not in (None, 1):
            raise ValueError(
                f"scale_factor={scale_factor} but the mlp projector keeps every token; use 1 or leave it out"
            )
        return patch_grid


@register(MlpConfig)
class Mlp(Projector):
    """`Linear(C->D), GELU, Linear(D->D)` on each patch token."""

    config: MlpConfig

    def __init__(self, config: MlpConfig):
        super().__init__()
        self.config = config
        self.layers = two_linears(config.vision_dim, config.language_dim)
        self.init_weights()

    def forward(self, features: VisionFeatures, scale_factor: int | None = None) -> Tensor:
        """Returns (N, L, D). Raises ValueError for a scale factor other than 1 and for features of other widths."""
        self.check_features(features)
        self.config.token_grid(features.patch_grid, scale_factor)
        return self.layers(features.query)  # (N, L, C) -> (N, L, D)
