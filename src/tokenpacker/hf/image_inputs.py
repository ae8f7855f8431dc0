"""The inputs of a model call that are about images, in one bundle.

Shapes: N tiles of all images in order of use, U different tiles (U = N without `tile_index`), (h, w) tile size, R
regions, P tiles of an image at most, L patches of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers.utils import torch_compilable_check

from tokenpacker.hf.outputs import ImageFeatures

ENCODED = "mm_encoder_outputs"  # transformers' name for what an earlier call of `get_image_features` gave


@dataclass(frozen=True)
class ImageInputs:
    """Tiles, their scale factors, and the regions of their images.

    Args:
        pixel_values: (U, 3, h, w) tiles, in the order of their placeholders.
        scale_factor: of all tiles; None takes `scale_factors`, or the projector's own.
        scale_factors: (N,), one per tile, as the processor makes them.
        tile_index: (N,) indices into `pixel_values`, so that a tile that occurs several times is encoded once.
        region_cells: (R, P, L) weights of the patches of each region's image; see `regions.RegionEncoder`.
        region_first_tile: (R,) index of the first tile of the region's image, among the N.

    Raises:
        ValueError: for a tile index or regions without tiles, and for regions that are given in part.
    """

    pixel_values: Tensor | None = None
    scale_factor: int | None = None
    scale_factors: Tensor | None = None
    tile_index: Tensor | None = None
    region_cells: Tensor | None = None
    region_first_tile: Tensor | None = None

    def __post_init__(self) -> None:
        cells, first_tile = self.region_cells, self.region_first_tile
        if self.pixel_values is None:
            for name in ("tile_index", "region_cells", "region_first_tile"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} was given without pixel_values, to which it belongs; pass both, or neither"
                    )
        elif (cells is None) != (first_tile is None):
            raise ValueError(
                "region_cells need region_first_tile, and this needs those; pass both as the processor made them"
            )
        elif cells is not None and cells.shape[0] and not self.pixel_values.shape[0]:
            raise ValueError(
                f"region_cells hold {cells.shape[0]} regions but pixel_values hold no tiles; pass the tiles of the"
                " regions' images"
            )

    def encoded(self, mm_encoder_outputs: dict[str, ImageFeatures] | None) -> ImageFeatures | None:
        """The images in `mm_encoder_outputs`, or None.

        Raises:
            ValueError: for another form than `{"image": ImageFeatures}`, and for images beside `pixel_values`.
        """
        given = mm_encoder_outputs or {}
        images = given.get("image")
        if set(given) - {"image"} or not (images is None or hasattr(images, "pooler_output")):
            raise ValueError(
                f"{ENCODED} holds {', '.join(map(str, given))}; pass {{'image': ...}} with the output of"
                " get_image_features"
            )
        if images is not None and self.pixel_values is not None:
            raise ValueError(f"pass pixel_values or {ENCODED}, not both: the latter replace the former")
        return images

    def resolve_scale_factors(self, own: int | None) -> int | list[int] | None:
        """One scale factor for all tiles, or a list with one for each; None stands for the projector's `own`.

        A compiled or exported graph cannot depend on the values of a tensor. It is made for one scale factor,
        `scale_factor` or `own`, and checks at run time that `scale_factors` are equal to it.

        Raises:
            ValueError: if `scale_factor` contradicts `scale_factors`.
        """
        if self.scale_factors is None:
            return self.scale_factor
        if torch.compiler.is_compiling():
            assumed = own if self.scale_factor is None else self.scale_factor
            if assumed is not None:
                equal = (self.scale_factors == assumed).all()
                torch_compilable_check(equal, "compile with the scale_factor of the inputs")
            return assumed
        factors = torch.as_tensor(self.scale_factors).flatten().tolist()
        if self.scale_factor is not None and set(factors) - {self.scale_factor}:
            raise ValueError(
                f"scale_factor={self.scale_factor} was given with inputs that the processor made for scale factors"
                f" {sorted(set(factors))}; leave scale_factor out, the inputs carry their own"
            )
        return factors


IMAGE_INPUTS = tuple(field.name for field in fields(ImageInputs))


def pick_image_inputs(arguments: dict[str, Any]) -> ImageInputs:
    """The image inputs among the keyword arguments of a call."""
    return ImageInputs(**{name: arguments.get(name) for name in IMAGE_INPUTS})
