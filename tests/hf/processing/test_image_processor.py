import json

import numpy as np
import pytest
import torch
from PIL import Image

from golden_pictures import synthetic
from tokenpacker.hf import TokenPackerImageProcessor
from tokenpacker.hf.processing.image_processor import RELEASED_OPTIONS
from tokenpacker.hf.processing.pictures import read_picture
from tokenpacker.images import ImageError, load_image
from tokenpacker.tiling import TileGrid, make_tiles

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
    monkeypatch.setattr("tokenpacker.hf.processing.image_processor.MAX_PIXELS", 500 * 336)
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
    for channels in (2, 5):
        with pytest.raises(ImageError, match=rf"shape \(8, 8, {channels}\) and type uint8 is no picture; pass uint8"):
            processor(np.zeros((8, 8, channels), np.uint8))


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
        ({"max_tiles": 0}, "max_tiles=0 must be an integer of at least 1"),
        ({"tile_size": (336,)}, r"tile_size=\(336,\) must be \(height, width\), each at least 1"),
    ],
)
def test_unknown_settings_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TokenPackerImageProcessor(**kwargs)


def whole_picture_in_floats(processor, picture, grid):
    """Tiles by the definition: all of the picture normalised, then interpolated."""
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    return make_tiles(
        (image - mean[:, None, None]) / std[:, None, None],
        grid,
        tuple(processor.tile_size),
        thumbnail_source=processor.thumbnail_source,
        antialias=processor.antialias,
    )


@pytest.mark.parametrize("size", [(333, 500), (701, 97), (40, 30), (96, 64), (64, 1000)])
@pytest.mark.parametrize("thumbnail_source", ["image", "canvas"])
@pytest.mark.parametrize(("antialias", "tolerance"), [(True, 0.016), (False, 2e-6)])
def test_tiles_are_those_of_the_whole_picture_in_floats(image_of, size, thumbnail_source, antialias, tolerance):
    processor = TokenPackerImageProcessor(
        tile_size=(32, 32), max_tiles=6, thumbnail_source=thumbnail_source, antialias=antialias
    )
    picture = image_of(*size)
    expected = whole_picture_in_floats(processor, picture, processor.choose_grid(size))
    # filtered, pixels are rounded to grey levels of 0.015; unfiltered, only floats round
    torch.testing.assert_close(processor(picture)["pixel_values"], expected, atol=tolerance, rtol=0)


def test_a_picture_that_grows_is_not_rounded_to_grey_levels(image_of):
    processor, picture = TokenPackerImageProcessor(tile_size=(32, 32)), image_of(20, 30)
    expected = whole_picture_in_floats(processor, picture, processor.choose_grid((20, 30)))
    torch.testing.assert_close(processor(picture)["pixel_values"], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_file_is_decoded_no_larger_than_needed(tmp_path, monkeypatch, orientation):
    file, exif = tmp_path / "picture.jpg", Image.Exif()
    exif[0x0112] = orientation  # 6: lies on its side
    synthetic(400, 600, 1).save(file, quality=90, exif=exif)
    decoded = []
    monkeypatch.setattr(
        "tokenpacker.hf.processing.image_processor.read_picture",
        lambda *args, **kwargs: decoded.append(read_picture(*args, **kwargs)) or decoded[-1],
    )
    processor = TokenPackerImageProcessor(tile_size=(32, 32))
    for source in (file, str(file), file.read_bytes()):
        reduced = processor(source)
        assert max(decoded[-1].size) == 150  # a quarter: the tiles show it 96 wide
    whole = processor(load_image(file))
    assert max(decoded[-1].size) == 600
    assert reduced["tile_grids"].tolist() == whole["tile_grids"].tolist()
    assert reduced["image_sizes"].tolist() == ([[400, 600]] if orientation == 1 else [[600, 400]])
    # Two filters after another. Grey levels are 0.015; 1.5 of them on average for this picture full of noise.
    assert (reduced["pixel_values"] - whole["pixel_values"]).abs().mean() < 1.5 * 0.015


def test_released_pixels_come_from_the_whole_jpeg_file(tmp_path):
    file = tmp_path / "picture.jpg"
    synthetic(400, 600, 1).save(file, quality=90)
    processor = TokenPackerImageProcessor(tile_size=(32, 32), **RELEASED_OPTIONS)
    assert torch.equal(processor(file)["pixel_values"], processor(load_image(file))["pixel_values"])


def test_a_damaged_jpeg_file_is_named(tmp_path):
    file = tmp_path / "cut.jpg"
    synthetic(400, 600, 1).save(file)
    file.write_bytes(file.read_bytes()[:9000])
    with pytest.raises(ImageError, match=r"cut\.jpg cannot be decoded"):
        TokenPackerImageProcessor(tile_size=(32, 32))(file)


def test_a_picture_that_is_passed_is_left_as_it_is(tmp_path, image_of):
    file = tmp_path / "picture.jpg"
    image_of(400, 600).save(file)
    with Image.open(file) as opened:
        TokenPackerImageProcessor(tile_size=(32, 32))(opened)
        assert opened.size == (600, 400)
    picture = image_of(400, 600)
    before = picture.tobytes()
    TokenPackerImageProcessor(tile_size=(32, 32))(picture)
    assert picture.tobytes() == before


def test_what_was_saved_comes_back_with_what_a_user_has_set_beside_it(tmp_path):
    processor = TokenPackerImageProcessor(image_mode="pad", tile_size=(8, 8), rescale_factor=0.5, do_normalize=False)
    processor.origin = "a camera"
    processor.save_pretrained(tmp_path)
    again = TokenPackerImageProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == processor.to_dict()
    assert again.origin == "a camera"
    assert TokenPackerImageProcessor.from_pretrained(tmp_path, do_normalize=True).do_normalize
