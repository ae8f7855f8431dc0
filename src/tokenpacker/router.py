"""`scale_factor="auto"`: the scale factor of each tile by its pixels alone, before any model runs.

The detail of a tile is the mean absolute difference of neighbouring pixels, with padding as flat. Tiles with less
detail than a fitted threshold get a larger scale factor, hence fewer tokens; a tile that shows nothing gets the
largest. To fit them to the loss that a coarser tile costs is the idea of ViR (InternVL3.5, arXiv:2508.18265), which
trains a classifier.

Shapes: N tiles of one image, (h, w) tile size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias

from torch import Tensor

from tokenpacker.projectors.base import require_positive
from tokenpacker.tiling import TileView

AUTO: Literal["auto"] = "auto"
ScaleFactor: TypeAlias = int | Literal["auto"]
STEPS = 2**16  # that a difference of 1 is counted in


@dataclass(frozen=True, kw_only=True)
class Router:
    """The rule and its fitted thresholds.

    Args:
        scale_factors: that a tile can get, the finest first.
        detail: one for each scale factor but the first: a tile with less detail gets this scale factor or a larger one.
        thumbnail_detail: the same for thumbnails.

    Raises:
        ValueError: unless scale factors rise and thresholds fall (or stay), and their numbers fit.
    """

    scale_factors: tuple[int, ...]
    detail: tuple[float, ...]
    thumbnail_detail: tuple[float, ...]

    def __post_init__(self) -> None:
        for factor in self.scale_factors:
            require_positive("router.scale_factors", factor)
        if len(self.scale_factors) < 2 or list(self.scale_factors) != sorted(set(self.scale_factors)):
            raise ValueError(f"router.scale_factors={list(self.scale_factors)} must be two or more that rise")
        for name in ("detail", "thumbnail_detail"):
            values = getattr(self, name)
            fits = len(values) == len(self.scale_factors) - 1 and list(values) == sorted(values, reverse=True)
            if not fits or not all(value >= 0 for value in values):
                raise ValueError(
                    f"router.{name}={list(values)} must have a threshold of at least 0 for each scale factor after the"
                    " first, none above the one before"
                )

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Router:
        """The router of a processor's config. Raises ValueError for other keys and values."""
        names = [field.name for field in fields(cls)]
        if not isinstance(content, Mapping) or set(content) != set(names):
            raise ValueError(f"router={content!r} must have exactly the keys {', '.join(names)}")
        try:
            return cls(**{name: tuple(value) for name, value in content.items()})
        except TypeError:
            raise ValueError(f"router={content!r} must hold lists of numbers") from None

    def to_dict(self) -> dict[str, list[Any]]:
        """A JSON-ready dict, which `from_dict` turns back."""
        return {name: list(value) for name, value in asdict(self).items()}

    @property
    def finest(self) -> int:
        """The scale factor of tiles full of detail."""
        return self.scale_factors[0]

    @property
    def coarsest(self) -> int:
        """The scale factor of tiles that show nothing."""
        return self.scale_factors[-1]

    def _thresholds(self, num_tiles: int) -> list[tuple[float, ...]]:
        """The thresholds of each tile of an image; of several tiles, the last is the thumbnail."""
        return [self.detail] * (num_tiles - 1) + [self.thumbnail_detail if num_tiles > 1 else self.detail]

    def reasons(self, details: Sequence[float], chosen: Sequence[int]) -> tuple[str, ...]:
        """Why each tile got its scale factor: its detail, and the threshold next to it or the budget."""
        told = []
        for detail, limits, factor in zip(details, self._thresholds(len(details)), chosen, strict=True):
            level = _level(detail, limits)
            rule = f" < {limits[level - 1]:.4f}" if level and detail else f" >= {limits[0]:.4f}" if detail else ""
            told.append(f"detail {detail:.4f}" + (rule if factor == self.scale_factors[level] else ", and the budget"))
        return tuple(told)

    def choose(self, details: Sequence[float], costs: Mapping[int, int], budget: int | None = None) -> list[int]:
        """The scale factor of each tile; the coarsest for one without any detail.

        As long as the image costs more than the budget, one tile gets the next larger scale factor: always that whose
        detail is lowest in relation to the threshold of this larger scale factor.

        Args:
            details: of the tiles, as `tile_details` gives them.
            costs: tokens of a tile, its separator included, at each of the scale factors.
            budget: most tokens of the image, at least those of all tiles at the coarsest scale factor.
        """
        thresholds = self._thresholds(len(details))
        levels = [_level(detail, own) for detail, own in zip(details, thresholds, strict=True)]

        def excess(tile: int) -> tuple[float, float, int]:
            limit = thresholds[tile][levels[tile]]
            return (details[tile] / limit if limit else float("inf"), details[tile], tile)

        def cost() -> int:
            return sum(costs[self.scale_factors[level]] for level in levels)

        last = len(self.scale_factors) - 1
        while budget is not None and cost() > budget:
            finer = [tile for tile, level in enumerate(levels) if level < last]
            assert finer, "the budget has room for all tiles at the coarsest scale factor"
            levels[min(finer, key=excess)] += 1
        return [self.scale_factors[level] for level in levels]


def _level(detail: float, limits: Sequence[float]) -> int:
    """Which of the scale factors the thresholds give a tile."""
    return sum(detail < limit for limit in limits) if detail > 0 else len(limits)


def own_router(content: Mapping[str, Any] | None) -> Router:
    """The router of a model's processor config. Raises ValueError for a model without one."""
    if content is None:
        raise ValueError(
            f"scale_factor={AUTO!r} needs thresholds that were fitted to the model, and this one has no router in its"
            " processor_config.json; give a number, or fit them as docs/auto.md shows"
        )
    return Router.from_dict(content)


def tile_details(tiles: Tensor, views: Sequence[TileView], image_size: tuple[int, int]) -> list[float]:
    """The detail of each tile (N, 3, h, w) of an image of (height, width), in the units of the pixels.

    It is the sum of absolute differences of neighbours, down and across, over the part that shows the image, divided by
    the number of neighbours in the whole tile. So padding is flat, and its border is no detail.
    """
    return [_detail(tile, _shown(tile, view, image_size)) for tile, view in zip(tiles, views, strict=True)]


def _shown(tile: Tensor, view: TileView, image_size: tuple[int, int]) -> Tensor:
    """The part of a tile (3, h, w) that shows the image; empty if none does."""
    spans = []
    for axis in (0, 1):
        edges = (-view.offset[axis] / view.scale[axis], (image_size[axis] - view.offset[axis]) / view.scale[axis])
        spans.append(slice(*(max(0, min(round(edge), tile.shape[axis + 1])) for edge in edges)))
    return tile[:, spans[0], spans[1]]


def _detail(tile: Tensor, shown: Tensor) -> float:
    """The sum of a part's differences by the number of neighbours in the tile.

    Sums of whole numbers are the same however torch splits them among threads, so that no count depends on them.
    """
    pairs = sum(tile.diff(dim=axis).numel() for axis in (1, 2))
    steps = sum(int((shown.diff(dim=axis).abs() * STEPS).long().sum()) for axis in (1, 2))
    return steps / (STEPS * max(1, pairs))
