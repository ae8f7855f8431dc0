"""Images to tiles, scale factors and token sequences, for `TokenPackerProcessor`.

Shapes: N tiles of all images in order, (h, w) tile size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tokenpacker.hf.processing.image_processor import ABOUT_ARRAYS, flatten
from tokenpacker.hf.processing.pictures import to_source
from tokenpacker.hf.processing.scale_factors import per_image, per_tile
from tokenpacker.images import image_size
from tokenpacker.projectors import config_from_dict
from tokenpacker.router import AUTO, own_router, tile_details
from tokenpacker.sequence import ImageLayout

if TYPE_CHECKING:
    from tokenpacker.hf.processing.processor import TokenPackerProcessor


@dataclass(frozen=True)
class ImagePlan:
    """How an image is packed.

    Args:
        scale_factors: as given, or one per tile as the router chose them.
        reasons: of the router, one per tile; None if it was not asked.
    """

    layout: ImageLayout
    scale_factors: Any
    reasons: tuple[str, ...] | None = None


def plan_sizes(
    processor: TokenPackerProcessor, sizes: Sequence[tuple[int, int]], images_kwargs: Mapping[str, Any]
) -> list[ImagePlan]:
    """The plan of each image of (height, width). Raises ValueError as `TokenPackerProcessor.image_layout`.

    With "auto" the layout is that of the coarsest scale factor: tiles are left out only if the budget asks even then.
    """
    options = {name: value for name, value in images_kwargs.items() if name not in ABOUT_ARRAYS}
    entries = per_image(options.pop("scale_factor", None), len(sizes))
    sure = [own_router(processor.router).coarsest if entry == AUTO else entry for entry in entries]
    layouts = [
        processor.image_layout(size, scale_factor=entry, **options) for size, entry in zip(sizes, sure, strict=True)
    ]
    return [ImagePlan(layout, entry) for layout, entry in zip(layouts, entries, strict=True)]


def process(processor: TokenPackerProcessor, images: Any, images_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """`pixel_values` (N, 3, h, w), `scale_factors` (N,) if tokens have any, and `image_plans`, one per image."""
    options = {name: value for name, value in images_kwargs.items() if name not in ("scale_factor", "max_image_tokens")}
    data_format = options.pop("input_data_format", None)
    sources = [to_source(image, data_format) for image in flatten(images)]
    sizes = [image_size(source) for source in sources]
    plans = plan_sizes(processor, sizes, images_kwargs)
    grids = [plan.layout.tile_grid for plan in plans]
    processed = dict(processor.image_processor(sources, tile_grids=grids, **options))
    if AUTO in [plan.scale_factors for plan in plans]:
        cutter = processor.image_processor.with_options(**{**options, "return_tensors": None})
        tiles = torch.as_tensor(processed["pixel_values"]).split([grid.num_tiles for grid in grids])
        views = [cutter.tile_views(size, grid) for size, grid in zip(sizes, grids, strict=True)]
        details = [tile_details(*shown) for shown in zip(tiles, views, sizes, strict=True)]
        budget = images_kwargs.get("max_image_tokens")
        plans = [
            _route(processor, plan, own, budget) if plan.scale_factors == AUTO else plan
            for plan, own in zip(plans, details, strict=True)
        ]
    config, layouts = config_from_dict(processor.projector_config), [plan.layout for plan in plans]
    factors = per_tile(config, processor._patch_grid, [plan.scale_factors for plan in plans], layouts)
    if factors is not None:
        processed["scale_factors"] = torch.tensor(factors, dtype=torch.int64)
    return processed | {"image_plans": plans, "image_layouts": layouts}


def _route(processor: TokenPackerProcessor, plan: ImagePlan, details: list[float], budget: int | None) -> ImagePlan:
    """The plan with the router's scale factors."""
    config, router, layout = config_from_dict(processor.projector_config), own_router(processor.router), plan.layout
    grids = {factor: config.token_grid(processor._patch_grid, factor) for factor in router.scale_factors}
    costs = {factor: rows * cols + layout.separators for factor, (rows, cols) in grids.items()}
    factors = router.choose(details, costs, budget)
    layout = ImageLayout(layout.tile_grid, [grids[factor] for factor in factors], layout.separators)
    return ImagePlan(layout, factors, router.reasons(details, factors))
