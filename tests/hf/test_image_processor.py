import json

import numpy as np
import pytest
import torch
from PIL import Image

from golden_pictures import synthetic
from tokenpacker.hf import TokenPackerImageProcessor
from tokenpacker.hf.image_processor import RELEASED_OPTIONS
from tokenpacker.images import ImageError
from tokenpacker.tiling import TileGrid

# Cutting is arithmetic on floats. Pillow resizes grey levels, of which one is 0.015; its versions may round otherwise.
TOLERANCE = {"slice": 1e-5, "pad": 0.016, "square": 0.016}


@pytest.mark.parametrize("case", ["slice9", "slice16", "slice25", "pad", "square"])
def test_pixels_equal_the_original_codes_preprocessing(golden, case):
    mode, max_tiles = case.rstrip("0123456789"), int(case.removeprefix("slice") if case.startswith("slice") else 9)
    processor = TokenPackerImageProcessor(image_mode=mode, max_tiles=max_tiles, **RELEASED_OPTIONS)
    stored = np.load(golden / "hd" / f"{case}.npz")
    images = [image for image in json.loads((golden / "hd" / "images.json").read_text())["images"] if case in image]
    assert len(images) == len(stored.files) >= 3
    for image in images:
        features = processor(synthetic(image["h"], image["w"], image["seed"]))
        tiles, expected = features["pixel_values"], image[case]
        assert features["tile_grids"].tolist() == [[expected["h_block"], expected["w_block"]]]
        lattice = torch.from_numpy(stored[f"{image['h']}x{image['w']}"])
        close = {"atol": TOLERANCE[mode], "rtol": 0}
        torch.testing.assert_close(tiles[:, :, ::37, ::37], lattice, **close)
        torch.testing.assert_close(tiles.mean((2, 3)), torch.tensor(expected["mean"]), **close)
        torch.testing.assert_close(tiles.std((2, 3), correction=0), torch.tensor(expected["std"]), **close)
        if mode == "slice":
            assert [filled(tile) for tile in tiles] == expected["filled_hw"]


def filled(tile):
    """[rows, cols] of a tile that are not all zero."""
    return [int(tile.ne(0).any(0).any(axis).sum()) for axis in (1, 0)]


@pytest.mark.parametrize("mode", ["slice", "pad", "square"])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (1, 672), (1000, 1), (3, 2016), (1, 20_000)])
def test_shapes_on_which_the_original_fails_give_tiles(mode, size):
    """A thumbnail of no height, three rows taken for channels, one grey value: each was an error there."""
    features = TokenPackerImageProcessor(image_mode=mode, **RELEASED_OPTIONS)(Image.new("RGB", size[::-1], "white"))
    pixels = features["pixel_values"]
    assert pixels.isfinite().all()
    assert pixels.shape[0] >= 1
    if mode != "pad":  # there, a line of pixels drowns in the mean colour
        assert (pixels > 1.9).any()  # white, normalised by CLIP's statistics


def test_thin_pictures_are_resized_without_a_huge_picture_in_between(monkeypatch, image_of):
    wide, tall = image_of(9, 500), image_of(500, 9)
    pad, square = (TokenPackerImageProcessor(image_mode=mode) for mode in ("pad", "square"))
    exact = [processor(picture)["pixel_values"] for processor in (pad, square) for picture in (wide, tall)]
    monkeypatch.setattr("tokenpacker.hf.image_processor.MAX_PIXELS", 500 * 336)
    thrifty = [processor(picture)["pixel_values"] for processor in (pad, square) for picture in (wide, tall)]
    assert torch.equal(exact[0], thrifty[0])
    assert (exact[1] - thrifty[1]).abs().mean() < 0.02  # the axes in the other order: overshoot is clipped elsewhere
    for one, other in zip(exact[2:], thrifty[2:], strict=True):
        torch.testing.assert_close(one, other, atol=0.016, rtol=0)  # a grey level
    with pytest.raises(ImageError, match="the image is 1x501, too long and thin for image_mode='pad'"):
        pad(Image.new("RGB", (501, 1)))


def test_slice_cuts_and_adds_a_thumbnail(image_of):
    features = TokenPackerImageProcessor(tile_size=(32, 32))([image_of(64, 96), image_of(32, 32)])
    assert features["tile_grids"].tolist() == [[2, 3], [1, 1]]
    assert features["image_sizes"].tolist() == [[64, 96], [32, 32]]
    assert features["pixel_values"].shape == (8, 3, 32, 32)


@pytest.mark.parametrize("mode", ["pad", "square"])
def test_the_other_modes_keep_one_piece(image_of, mode):
    features = TokenPackerImageProcessor(image_mode=mode, tile_size=(32, 48))(image_of(100, 30))
    assert features["pixel_values"].shape == (1, 3, 32, 48)


def test_pad_surrounds_the_picture_with_the_mean_colour(image_of):
    pixels = TokenPackerImageProcessor(image_mode="pad", tile_size=(32, 32))(image_of(16, 32))["pixel_values"][0]
    assert pixels[:, :6].abs().max() < 0.02  # the mean colour, rounded to whole grey levels
    assert pixels[:, 10:22].std() > 0.5


@pytest.mark.parametrize("mode", ["slice", "pad", "square"])
def test_views_map_tiles_back_to_the_image(mode):
    """The picture is black but for one white spot; the view says where the tile shows it."""
    processor = TokenPackerImageProcessor(image_mode=mode, tile_size=(32, 32), antialias=False)
    pixels = np.zeros((60, 80, 3), np.uint8)
    pixels[20:32, 40:52] = 255
    features = processor(Image.fromarray(pixels))
    grid = TileGrid(*features["tile_grids"][0].tolist())
    views = processor.tile_views((60, 80), grid)
    seen = 0
    for tile, view in zip(features["pixel_values"], views, strict=True):
        ys, xs = (tile[0] > 1.5).nonzero(as_tuple=True)
        if len(ys) < 4:
            continue
        seen += 1
        assert abs((ys.float().mean() + 0.5) * view.scale[0] + view.offset[0] - 26) < 8
        assert abs((xs.float().mean() + 0.5) * view.scale[1] + view.offset[1] - 46) < 8
    assert seen >= 1


def test_arrays_and_tensors_are_taken_as_pictures(image_of):
    picture = image_of(32, 32)
    processor = TokenPackerImageProcessor(tile_size=(32, 32))
    expected = processor(picture)["pixel_values"]
    array = np.array(picture)
    for image in (array, torch.from_numpy(array), torch.from_numpy(array).permute(2, 0, 1)):
        assert torch.equal(processor(image)["pixel_values"], expected)


def test_arrays_that_are_no_pictures_are_refused():
    processor = TokenPackerImageProcessor()
    with pytest.raises(ImageError, match=r"shape \(8, 8, 3\) and type float32 is no picture; pass uint8"):
        processor(np.full((8, 8, 3), np.nan, np.float32))


def test_new_processors_are_sound_and_the_preset_is_released():
    sound, released = TokenPackerImageProcessor(), TokenPackerImageProcessor(**RELEASED_OPTIONS)
    assert {name: getattr(sound, name) for name in RELEASED_OPTIONS} == {
        "grid_list": "all",
        "thumbnail_source": "image",
        "antialias": True,
    }
    assert {name: getattr(released, name) for name in RELEASED_OPTIONS} == RELEASED_OPTIONS


def test_settings_survive_saving(tmp_path):
    processor = TokenPackerImageProcessor(image_mode="pad", tile_size=(48, 32), max_tiles=4, **RELEASED_OPTIONS)
    processor.save_pretrained(tmp_path)
    again = TokenPackerImageProcessor.from_pretrained(tmp_path)
    for name in ("image_mode", "tile_size", "max_tiles", "image_mean", "thumbnail_source", "antialias", "grid_list"):
        assert getattr(again, name) == getattr(processor, name)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"image_mode": "hd"}, "image_mode='hd' is unknown; use one of slice, pad, square"),
        ({"thumbnail_source": "padded"}, "thumbnail_source='padded' is unknown"),
        ({"grid_list": "paper"}, "grid_list='paper' is unknown; use 'all' or 'released'"),
        ({"max_tiles": 0}, "max_tiles=0 must be at least 1"),
        ({"tile_size": (336,)}, r"tile_size=\(336,\) must be \(height, width\), each at least 1"),
    ],
)
def test_unknown_settings_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TokenPackerImageProcessor(**kwargs)
