"""Images to the tiles that the vision tower reads.

Shapes: I images, N tiles of all images in order, (h, w) tile size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.processing_utils import Unpack

from tokenpacker.hf.processing.keywords import ImageMode, TokenPackerImageProcessorKwargs, check_names
from tokenpacker.hf.processing.pictures import read_picture, to_source
from tokenpacker.images import MAX_PIXELS, ImageError, ImageSource, image_size, load_unconverted
from tokenpacker.projectors.base import require_positive
from tokenpacker.tiling import (
    GridList,
    ThumbnailSource,
    TileGrid,
    TileView,
    choose_tile_grid,
    fit_within,
    make_tiles,
    resize,
    slice_views,
    tile_grids,
)

IMAGE_MODES = get_args(ImageMode)
ABOUT_ARRAYS = ("return_tensors", "input_data_format")  # keywords of a call only
OPTIONS = tuple(name for name in TokenPackerImageProcessorKwargs.__annotations__ if name not in ABOUT_ARRAYS)
SAVED_BESIDE = ("image_processor_type", "processor_class", "auto_map")  # what transformers saves beside the options
CUBIC_REACH = 3  # source pixels beside a pixel, at scale 1, that a bicubic filter reads: 2, and 1 for rounding

# Released weights need this: mode `slice` as it was when they were trained. See `docs/released.md`.
RELEASED_OPTIONS: Mapping[str, Any] = MappingProxyType(
    {"grid_list": "released", "thumbnail_source": "canvas", "antialias": False}
)


class TokenPackerImageProcessor(BaseImageProcessor):
    """Cuts, pads and normalises images.

    The defaults are for new models. Released weights need `TokenPackerImageProcessor(max_tiles=9, **RELEASED_OPTIONS)`,
    which changes mode `slice` only. Every option may also be given to a single call.

    Args:
        image_mode: `slice` cuts an image into a grid of tiles and adds a thumbnail (TokenPacker-HD); `pad` centres it
            on a square of the mean colour (LLaVA-1.5); `square` crops the centre, as CLIP does.
        tile_size: (height, width) in pixels, the vision tower's image size.
        max_tiles: limit of rows*cols in mode `slice`; the thumbnail comes on top.
        image_mean: mean per channel that the vision tower was trained with, of pixels between 0 and 1.
        image_std: standard deviation per channel of the same pixels.
        thumbnail_source: see `tiling.make_tiles`.
        antialias: see `tiling.make_tiles`.
        grid_list: see `tiling.tile_grids`.
        do_convert_rgb: False keeps the channels that an image has.
        do_rescale: whether pixels are multiplied by `rescale_factor`.
        rescale_factor: 1/255 makes bytes numbers between 0 and 1.
        do_normalize: whether mean and deviation are brought to 0 and 1.

    Raises:
        ValueError: for an unknown option, mode, source or list, or sizes below 1.
    """

    valid_kwargs = TokenPackerImageProcessorKwargs
    model_input_names = ["pixel_values"]  # noqa: RUF012 - transformers' convention

    def __init__(
        self,
        image_mode: str = "slice",
        tile_size: Sequence[int] = (336, 336),
        max_tiles: int = 9,
        image_mean: Sequence[float] = tuple(OPENAI_CLIP_MEAN),
        image_std: Sequence[float] = tuple(OPENAI_CLIP_STD),
        thumbnail_source: ThumbnailSource = "image",
        antialias: bool = True,
        grid_list: GridList = "all",
        do_convert_rgb: bool = True,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        **kwargs: Any,
    ):
        check_names(kwargs, [*OPTIONS, *SAVED_BESIDE], type(self).__name__)
        super().__init__(**kwargs)
        if image_mode not in IMAGE_MODES:
            raise ValueError(f"image_mode={image_mode!r} is unknown; use one of {', '.join(IMAGE_MODES)}")
        if thumbnail_source not in ("image", "canvas"):
            raise ValueError(f"thumbnail_source={thumbnail_source!r} is unknown; use 'image' or 'canvas'")
        if len(tile_size) != 2 or min(tile_size) < 1:
            raise ValueError(f"tile_size={tuple(tile_size)} must be (height, width), each at least 1")
        require_positive("max_tiles", max_tiles)
        tile_grids(max_tiles, grid_list)  # refuses what it cannot list
        self.image_mode = image_mode
        self.tile_size = list(tile_size)
        self.max_tiles = max_tiles
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.thumbnail_source = thumbnail_source
        self.antialias = antialias
        self.grid_list = grid_list
        self.do_convert_rgb = do_convert_rgb
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize

    def with_options(self, **options: Any) -> TokenPackerImageProcessor:
        """The image processor with other options; None keeps its own.

        Raises:
            ValueError: for options that do not exist or do not fit.
        """
        given = {name: value for name, value in options.items() if value is not None}
        own = {name: getattr(self, name) for name in OPTIONS}
        return type(self)(**{**own, **given}) if given else self

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The saved image processor, with attributes that a user had set beside the options."""
        known = (*OPTIONS, *SAVED_BESIDE)
        options = {name: value for name, value in image_processor_dict.items() if name in known}
        built = super().from_dict(options, **kwargs)
        for name in image_processor_dict.keys() - set(known):
            setattr(built[0] if isinstance(built, tuple) else built, name, image_processor_dict[name])
        return built

    def fetch_images(self, images: Any) -> Any:
        """The images as they are: `preprocess` reads files and addresses, with limits of its own."""
        return images

    def preprocess(
        self,
        images: Any,
        tile_grids: Sequence[TileGrid] | None = None,
        **kwargs: Unpack[TokenPackerImageProcessorKwargs],
    ) -> BatchFeature:
        """`pixel_values` (N, 3, h, w), and per image `tile_grids` (I, 2) and `image_sizes` (I, 2).

        Args:
            images: one image or a (nested) list: Pillow images, paths, bytes, http(s) and data addresses, base64, or
                uint8 arrays and tensors.
            tile_grids: the grids to cut into; chosen here when None.
            kwargs: options of the constructor for this call, `return_tensors` ("pt" by default), and the place of the
                channels in arrays as `input_data_format` (told from their shape when None).

        Raises:
            ImageError: for an image that cannot be read.
            ValueError: for options that do not exist or do not fit.
        """
        check_names(kwargs, self.valid_kwargs.__annotations__, type(self).__name__)
        options: dict[str, Any] = dict(kwargs)
        data_format = options.pop("input_data_format", None)
        return_tensors = options.pop("return_tensors", None) or "pt"
        cutter = self.with_options(**options)
        sources = [to_source(image, data_format) for image in flatten(images)]
        sizes = [image_size(source) for source in sources]
        if tile_grids is None:
            tile_grids = [cutter.choose_grid(size) for size in sizes]
        tiles = [cutter._tiles(source, grid) for source, grid in zip(sources, tile_grids, strict=True)]
        data = {
            "pixel_values": torch.cat(tiles) if tiles else torch.empty(0, 3, *cutter.tile_size),
            "tile_grids": torch.tensor([(grid.rows, grid.cols) for grid in tile_grids]).reshape(-1, 2),
            "image_sizes": torch.tensor(sizes).reshape(-1, 2),
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def choose_grid(self, image_size: tuple[int, int]) -> TileGrid:
        """The grid for an image of (height, width); 1x1 in the modes that keep it in one piece."""
        if self.image_mode != "slice":
            return TileGrid(1, 1)
        return choose_tile_grid(image_size, self._tile_size, self.max_tiles, self.grid_list)

    def tile_views(self, image_size: tuple[int, int], grid: TileGrid) -> list[TileView]:
        """For each tile, where in an image of (height, width) its pixels come from."""
        if self.image_mode == "slice":
            return slice_views(image_size, grid, self._tile_size, self.thumbnail_source)
        if self.image_mode == "pad":
            side = max(image_size)
            top, left = ((side - length) // 2 for length in image_size)
            return [TileView((side / self.tile_size[0], side / self.tile_size[1]), (-top, -left))]
        covering = cover_size(image_size, self._tile_size)
        scale = (image_size[0] / covering[0], image_size[1] / covering[1])
        top, left = crop_offset(covering, self._tile_size)
        return [TileView(scale, (top * scale[0], left * scale[1]))]

    @property
    def _tile_size(self) -> tuple[int, int]:
        return self.tile_size[0], self.tile_size[1]

    def _read(self, source: ImageSource, at_least: tuple[int, int] | None = None) -> Image.Image:
        return read_picture(source, at_least) if self.do_convert_rgb else load_unconverted(source)

    def _tiles(self, source: ImageSource, grid: TileGrid) -> Tensor:
        """(n, 3, h, w) tiles of one image."""
        if self.image_mode == "slice":
            return self._slice(source, grid)
        picture = self._read(source)
        if self.image_mode == "pad":
            background = tuple(int(mean * 255) for mean in self.image_mean)
            picture = shrink_padded(picture, background, self._tile_size)
        else:
            picture = cover_and_crop(picture, self._tile_size)
        return self._normalise(_pixels(picture))[None]

    def _slice(self, source: ImageSource, grid: TileGrid) -> Tensor:
        """The tiles that `make_tiles` gives of the normalised image, without normalising all of a large one."""
        size = image_size(source)
        fitted = fit_within(size, grid.canvas_size(self._tile_size))
        # Released weights need this: every pixel as it was stored.
        pixels = _pixels(self._read(source, at_least=fitted if self.antialias else None))
        image = self._resize(pixels, fitted)
        tiles = make_tiles(image, grid, self._tile_size, antialias=False)  # its thumbnail is replaced, so made cheaply
        if grid.has_thumbnail:
            small = fit_within(size, self._tile_size)
            if self.thumbnail_source == "image":
                thumbnail = self._resize(pixels, small)
            else:
                canvas = make_tiles(image, TileGrid(1, 1), grid.canvas_size(self._tile_size))[0]  # one large tile
                thumbnail = resize(canvas, small, self.antialias)
            tiles[-1] = make_tiles(thumbnail, TileGrid(1, 1), self._tile_size)[0]
        return tiles

    def _resize(self, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        """(3, H, W) uint8 -> (3, *size), normalised.

        A picture that grows is normalised first. One that shrinks is normalised last, so that only the small picture
        is in floats. With antialias it is rounded to grey levels in between; without, the result differs by a few 1e-7.
        """
        if size[0] * size[1] >= pixels.shape[1] * pixels.shape[2]:
            return resize(self._normalise(pixels), size, self.antialias)
        if self.antialias:
            return self._normalise(resize(pixels, size, antialias=True))
        planes = pixels.contiguous()  # one colour at a time, so that only a third of the picture is in floats
        return self._normalise(torch.cat([resize(plane[None].float(), size, antialias=False) for plane in planes]))

    def _normalise(self, pixels: Tensor) -> Tensor:
        """(3, H, W) -> float32, mean 0 and deviation 1 by the tower's statistics."""
        pixels = pixels.float()
        if self.do_rescale:  # in place, here and below: a large photograph is gigabytes here
            pixels = pixels.div_(255) if self.rescale_factor == 1 / 255 else pixels.mul_(self.rescale_factor)
        if self.do_normalize:
            mean, std = torch.tensor(self.image_mean), torch.tensor(self.image_std)
            if len(mean) != len(pixels) or len(std) != len(pixels):
                raise ValueError(
                    f"image_mean has {len(mean)} and image_std {len(std)} entries for an image of {len(pixels)}"
                    " channels; give one of each per channel"
                )
            pixels = pixels.sub_(mean[:, None, None]).div_(std[:, None, None])
        return pixels


def _pixels(picture: Image.Image) -> Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.atleast_3d(np.array(picture))).permute(2, 0, 1)


def cover_size(image_size: tuple[int, int], tile_size: tuple[int, int]) -> tuple[int, int]:
    """The smallest size of the image's aspect ratio that covers a tile; the longer side is cut off to an integer."""
    (height, width), (tile_height, tile_width) = image_size, tile_size
    if tile_height / height >= tile_width / width:
        return tile_height, max(tile_width, int(width * tile_height / height))
    return max(tile_height, int(height * tile_width / width)), tile_width


def crop_offset(size: tuple[int, int], tile_size: tuple[int, int]) -> tuple[int, int]:
    """(top, left) of a centred tile in a picture of `size`."""
    return (size[0] - tile_size[0]) // 2, (size[1] - tile_size[1]) // 2


def cover_and_crop(picture: Image.Image, tile_size: tuple[int, int]) -> Image.Image:
    """The centre of the picture, resized so that it covers a tile.

    Of a thin picture, which would have more than `MAX_PIXELS`, only the tile's own pixels are computed. The result is
    the same within a grey level.
    """
    height, width = cover_size((picture.height, picture.width), tile_size)
    top, left = crop_offset((height, width), tile_size)
    bottom, right = top + tile_size[0], left + tile_size[1]
    if height * width <= MAX_PIXELS:
        return picture.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, right, bottom))
    first_row, last_row, y0, y1 = _share(picture.height, top, bottom, picture.height / height)
    first_col, last_col, x0, x1 = _share(picture.width, left, right, picture.width / width)
    part = picture.crop((first_col, first_row, last_col, last_row))
    return part.resize(tile_size[::-1], Image.Resampling.BICUBIC, box=(x0, y0, x1, y1))


def _share(length: int, start: int, stop: int, scale: float) -> tuple[int, int, float, float]:
    """The source pixels (first, last) of start..stop on a resized axis, and the place (start, stop) among them.

    Pillow rounds places to float32, which is exact enough only for the small numbers of a cut-out.
    """
    margin = CUBIC_REACH * math.ceil(max(scale, 1))
    first, last = max(0, int(start * scale) - margin), min(math.ceil(stop * scale) + margin, length)
    return first, last, start * scale - first, min(stop * scale, length) - first


def shrink_padded(picture: Image.Image, background: tuple[int, ...], tile_size: tuple[int, int]) -> Image.Image:
    """The picture centred on a square of its longer side, and the square resized to a tile.

    If the square would hold more than `MAX_PIXELS`, the longer side is resized before the shorter one is padded. Pillow
    resizes the width first, so a wide picture gets the same pixels, and a tall one almost the same.

    Raises:
        ImageError: for a picture so long and thin that even this would exceed `MAX_PIXELS`.
    """
    width = height = max(picture.size)
    if width * height > MAX_PIXELS:
        if width * max(tile_size) > MAX_PIXELS:
            raise ImageError(
                f"the image is {picture.height}x{picture.width}, too long and thin for image_mode='pad'; cut it into"
                " parts, or use image_mode='slice'"
            )
        if picture.width > picture.height:
            width = tile_size[1]
            picture = picture.resize((width, picture.height), Image.Resampling.BICUBIC)
        else:
            height = tile_size[0]
            picture = picture.resize((picture.width, height), Image.Resampling.BICUBIC)
    padded = Image.new(picture.mode, (width, height), background)
    padded.paste(picture, ((width - picture.width) // 2, (height - picture.height) // 2))
    return padded.resize(tile_size[::-1], Image.Resampling.BICUBIC)


def flatten(images: Any) -> list[Any]:
    """The images of (nested) lists in order, or of a lone image."""
    if isinstance(images, (list, tuple)):
        return [image for entry in images for image in flatten(entry)]
    return [images]
