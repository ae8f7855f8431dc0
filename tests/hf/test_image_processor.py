import json

import numpy as np
import pytest
import torch
from PIL import Image

from tokenpacker.hf import TokenPackerImageProcessor
from tokenpacker.images import ImageError
from tokenpacker.tiling import TileGrid


def synthetic(height, width, seed):
    """The golden data's picture: integer arithmetic on wrapping 64-bit numbers."""
    y, x = np.arange(height, dtype=np.uint64)[:, None], np.arange(width, dtype=np.uint64)[None, :]
    seed = np.uint64(seed)
    t = (((np.uint64(7) * x + np.uint64(11) * y) // np.uint64(4)) + np.uint64(13) * seed) % np.uint64(512)
    ramp_x = np.broadcast_to(np.uint64(255) * x // np.uint64(max(1, width - 1)), (height, width))
    ramp_y = np.broadcast_to(np.uint64(255) * y // np.uint64(max(1, height - 1)), (height, width))
    base = [ramp_x, ramp_y, np.where(t < 256, t, np.uint64(511) - t)]
    channels = []
    for channel in range(3):
        salt = np.uint64((channel + 1) * 83492791 + int(seed) * 2654435761)
        n = (x * np.uint64(73856093)) ^ (y * np.uint64(19349663)) ^ salt
        n = ((n & np.uint64(0xFFFFFFFF)) * np.uint64(2246822519)) & np.uint64(0xFFFFFFFF)
        n = n ^ (n >> np.uint64(13))
        noise = (n >> np.uint64(8)) % np.uint64(49)
        channels.append(np.clip(base[channel].astype(np.int64) + noise.astype(np.int64) - 24, 0, 255))
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


RELEASED = {"thumbnail_source": "canvas", "antialias": False}
MAX_TEST_PIXELS = 1_000_000  # larger golden images add minutes, not coverage


@pytest.mark.parametrize("mode", ["slice9", "pad", "square"])
def test_pixels_equal_the_original_codes_preprocessing(golden, mode):
    processor = TokenPackerImageProcessor(image_mode=mode.rstrip("9"), **RELEASED)
    stored = np.load(golden / "hd" / f"{mode}.npz")
    compared = 0
    for case in json.loads((golden / "hd" / "images.json").read_text())["images"]:
        key = f"{case['h']}x{case['w']}"
        if key not in stored or case["h"] * case["w"] > MAX_TEST_PIXELS:
            continue
        tiles = processor(synthetic(case["h"], case["w"], case["seed"]))["pixel_values"]
        # a grey level is 0.015; other versions of Pillow may round one differently when they resize
        tolerance = 1e-5 if mode == "slice9" else 0.016
        torch.testing.assert_close(tiles[:, :, ::37, ::37], torch.from_numpy(stored[key]), atol=tolerance, rtol=0)
        torch.testing.assert_close(tiles.mean((2, 3)), torch.tensor(case[mode]["mean"]), atol=1e-4, rtol=0)
        compared += 1
    assert compared >= 3


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


def test_settings_survive_saving(tmp_path):
    processor = TokenPackerImageProcessor(image_mode="pad", tile_size=(48, 32), max_tiles=4, **RELEASED)
    processor.save_pretrained(tmp_path)
    again = TokenPackerImageProcessor.from_pretrained(tmp_path)
    for name in ("image_mode", "tile_size", "max_tiles", "image_mean", "thumbnail_source", "antialias"):
        assert getattr(again, name) == getattr(processor, name)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"image_mode": "hd"}, "image_mode='hd' is unknown; use one of slice, pad, square"),
        ({"thumbnail_source": "padded"}, "thumbnail_source='padded' is unknown"),
        ({"max_tiles": 0}, "max_tiles=0 must be at least 1"),
    ],
)
def test_unknown_settings_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TokenPackerImageProcessor(**kwargs)
