"""The MLP projector of LLaVA-1.5: every patch token becomes one token. The full-count baseline.

Shapes: N tiles, (h, w) patch grid, L = h*w, C vision width, D language width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from tokenpacker.features import VisionFeatures
from tokenpacker.projectors.base import Projector, ProjectorConfig, register


@dataclass(frozen=True, kw_only=True)
class MlpConfig(ProjectorConfig):
    """Two linears with GELU on the query level; the other levels are not read."""

    name: ClassVar[str] = "mlp"

    def token_grid(self, patch_grid: tuple[int, int], scale_factor: int | None = None) -> tuple[int, int]:
        """The patch grid itself. Raises ValueError for a scale factor other than 1."""
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
        self.layers = nn.Sequential(
            nn.Linear(config.vision_dim, config.language_dim),
            nn.GELU(),
            nn.Linear(config.language_dim, config.language_dim),
        )
        self.init_weights()

    def forward(self, features: VisionFeatures, scale_factor: int | None = None) -> Tensor:
        """(N, L, D). Raises ValueError for a scale factor other than 1 and for features of other widths."""
        self.check_features(features)
        self.config.token_grid(features.patch_grid, scale_factor)
        return self.layers(features.query)  # (N, L, C) -> (N, L, D)
