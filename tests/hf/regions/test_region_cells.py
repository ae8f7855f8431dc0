"""Regions through the processor: which patches count how much, where masks go, and what they are checked for."""

import copy
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from tokenpacker.hf import TokenPackerProcessor
from tokenpacker.hf.processing.image_processor import RELEASED_OPTIONS, TokenPackerImageProcessor
from tokenpacker.hf.regions.masks import mark_region, to_mask
from tokenpacker.hf.regions.region_cells import Canvas, region_tensors
from tokenpacker.images import ImageError, no_files
from tokenpacker.regions import cells_under, covered_share
from tokenpacker.tiling import TileGrid

BOX = (0, 0, 9, 9)
LEFT_HALF = (0, 0, 48, 64)  # of an image of 64 x 96
PATCH_GRID = (8, 8)


def with_rule(region_model, rule):
    processor = copy.copy(region_model[1])
    processor.region_rule = rule
    return processor


def weights_of(regions, size, mode, tile_size, rule):
    """(R, n, L) weights of the patches of one image."""
    images = TokenPackerImageProcessor(image_mode=mode, tile_size=tile_size, max_tiles=4)
    canvas = Canvas(images, size, images.choose_grid(size), PATCH_GRID)
    return region_tensors([regions], [canvas], 64, rule)["region_cells"]


def plain_weights(mask, canvas, rule):
    """(rows, cols) weights of patches from a mask of the whole image, and for the released rule a whole canvas."""
    size = mask.shape
    if rule == "coverage":
        spans = [canvas.view.spans(axis, canvas.starts[axis], canvas.patch_size[axis]) for axis in (0, 1)]
        return covered_share(torch.from_numpy(mask)[None], *spans)[0]
    ends = canvas.grid.canvas_size(canvas.tile_size)
    rows, cols = (canvas.view.nearest(axis, ends[axis], size[axis]) for axis in (0, 1))
    drawn = torch.from_numpy(mask)[rows.clamp_min(0)][:, cols.clamp_min(0)] & (rows >= 0)[:, None] & (cols >= 0)
    weights = torch.empty(len(canvas.starts[0]), len(canvas.starts[1]))
    for i, row in enumerate(canvas.starts[0].tolist()):
        for j, col in enumerate(canvas.starts[1].tolist()):
            patch = drawn[None, row : row + canvas.patch_size[0], col : col + canvas.patch_size[1]]
            weights[i, j] = cells_under(patch, canvas.patch_size, "centre")
    return weights


@settings(max_examples=80, deadline=None)
@given(
    size=st.one_of(
        st.tuples(st.integers(1, 90), st.integers(1, 90)), st.sampled_from([(1, 500), (500, 1), (1, 1), (333, 777)])
    ),
    corners=st.tuples(*[st.floats(0, 0.999)] * 4),  # within the image
    mode=st.sampled_from(["slice", "pad", "square"]),
    tile_size=st.sampled_from([(32, 32), (30, 30), (37, 50)]),
    rule=st.sampled_from(["coverage", "centre"]),
)
def test_only_the_part_of_an_image_where_a_region_lies_is_worked_on_with_the_result_of_all(
    size, corners, mode, tile_size, rule
):
    (top, bottom), (left, right) = (
        sorted((a * length, b * length)) for a, b, length in zip(corners[::2], corners[1::2], size, strict=True)
    )
    bottom, right = max(bottom, top + 1.1), max(right, left + 1.1)  # none of shares
    images = TokenPackerImageProcessor(image_mode=mode, tile_size=tile_size, max_tiles=4)
    canvas = Canvas(images, size, images.choose_grid(size), PATCH_GRID)
    box, outline = (left, top, right, bottom), [[left, top, right, bottom, left, bottom]]
    boxed = to_mask(box, size)
    for region, mask in ((box, boxed), (boxed, boxed), (outline, to_mask(outline, size))):
        cells = canvas.weights(mark_region(region, size), rule)
        tiles = plain_weights(mask, canvas, rule).unflatten(1, (canvas.grid.cols, -1))
        expected = tiles.unflatten(0, (canvas.grid.rows, -1)).transpose(1, 2).flatten(0, 1).flatten(1)
        shown = cells[: canvas.grid.rows * canvas.grid.cols]
        # float64 rounded once to float32: the last bit may differ where it was nearly a tie; the released rule counts
        torch.testing.assert_close(shown, expected, atol=2**-24 if rule == "coverage" else 0, rtol=0)


@pytest.mark.parametrize("mode", ["slice", "pad"])
@pytest.mark.parametrize("rule", ["coverage", "centre"])
def test_a_line_of_pixels_is_marked_where_it_is_shown(mode, rule):
    """The right half of an image of 1 x 500: a tile wide at most, and less than a patch high."""
    cells = weights_of([(250, 0, 500, 1)], (1, 500), mode, (32, 32), "coverage")
    canvas = cells[0, : 4 if mode == "slice" else 1].view(-1, 8, 8)
    columns = canvas.sum(dim=1).flatten() > 0
    half = len(columns) // 2
    assert columns.tolist() == [False] * half + [True] * half
    assert weights_of([(0, 0, 500, 1)], (1, 500), mode, (32, 32), rule).shape == cells.shape


def test_masks_are_given_for_the_image_as_its_exif_orientation_shows_it(region_model, image_of):
    _, processor = region_model
    stored, exif = image_of(32, 64), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # shown turned to the right: 64 high and 32 wide
    stored.info["exif"] = exif.tobytes()
    turned = Image.open(saved(stored))
    mask = np.zeros((64, 32), dtype=bool)
    mask[:32] = True
    cells = processor(turned, "<image><mask>", region_masks=[[mask]], return_tensors="pt")["region_cells"]
    assert cells.shape == (1, 3, 64)
    assert (cells[0, 0] == 1).all()
    assert not cells[0, 1:].any()
    with pytest.raises(ValueError, match=r"is 32x64 but its image is 64x32; .* as shown, after EXIF rotation"):
        processor(turned, "<image><mask>", region_masks=[[mask.T]])
    with pytest.raises(ValueError, match=r"is an RLE of size \[32, 64\] .* as shown, after EXIF rotation"):
        processor(turned, "<image><mask>", region_masks=[[{"size": [32, 64], "counts": [0, 2048]}]])


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_a_turned_file_gives_what_its_upright_picture_gives_in_every_way_it_may_come(
    region_model, image_of, tmp_path, format
):
    _, processor = region_model
    upright, exif = image_of(64, 32), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    lossless = {"lossless": True} if format == "WEBP" else {}
    path = tmp_path / "turned"
    upright.transpose(Image.Transpose.ROTATE_90).save(path, format, exif=exif, **lossless)
    regions = {"region_masks": [[(2, 40, 30, 60)]], "return_tensors": "pt"}  # outside of the picture on its side
    expected = processor(upright, "<image><mask>", **regions)
    for source in (path, path.read_bytes(), Image.open(path)):
        inputs = processor(source, "<image><mask>", **regions)
        assert all(torch.equal(inputs[key], expected[key]) for key in expected)


def saved(picture):
    """A picture as the bytes of a PNG file, with its EXIF data."""
    file = io.BytesIO()
    picture.save(file, "PNG", exif=picture.info["exif"])
    return file


def test_paths_are_refused_where_files_are_switched_off_and_nowhere_else(region_model, image_of, tmp_path):
    _, processor = region_model
    image, path, mask = image_of(32, 32), tmp_path / "image.png", tmp_path / "mask.png"
    image.save(path)
    Image.fromarray(to_mask(BOX, (32, 32))).save(mask)
    expected = processor(path, "<image><mask>", region_masks=[[{"mask": str(mask)}]])
    with no_files():
        with ThreadPoolExecutor(1) as other_thread:
            other_thread.submit(processor, path, "<image><mask>", region_masks=[[mask]]).result()
        for wrong in (path, str(path), tmp_path / "no.png", "https://example.org/image.png"):
            with pytest.raises(ImageError, match="is a path or an address, and none is read here; pass the bytes of"):
                processor(wrong, "<image><mask>", region_masks=[[BOX]])
        for wrong in ({"mask": str(mask)}, {"mask": mask}, mask, str(mask), str(tmp_path / "no.png")):
            with pytest.raises(ImageError, match="is a path or an address, and none is read here"):
                processor(image, "<image><mask>", region_masks=[[wrong]])
        processor(path.read_bytes(), "<image><mask>", region_masks=[[BOX]])
    again = processor(str(path), "<image><mask>", region_masks=[[mask]])
    assert again["input_ids"] == expected["input_ids"]


def test_regions_may_be_given_by_themselves_where_only_one_image_is(region_model, image_of, tmp_path):
    _, processor = region_model
    mask = to_mask(BOX, (32, 32))
    Image.fromarray(mask).save(tmp_path / "mask.png")
    flipped = np.flip(np.flip(mask, 1).copy(), 1)  # runs backwards in memory
    flipped.flags.writeable = False
    expected = processor(image_of(32, 32), "<image><mask>", region_masks=[[BOX]], return_tensors="pt")["region_cells"]
    boxes = np.array([BOX], dtype=np.float32)
    for regions in (BOX, [BOX], mask, [flipped], str(tmp_path / "mask.png"), tmp_path / "mask.png", boxes, [boxes]):
        inputs = processor(image_of(32, 32), "<image><mask>", region_masks=regions, return_tensors="pt")
        assert torch.equal(inputs["region_cells"], expected)


def test_a_patch_weighs_its_share_under_the_mask_tile_by_tile(region_model, image_of):
    _, processor = region_model
    inputs = processor(image_of(64, 96), "<image><mask>", region_masks=[[LEFT_HALF]], return_tensors="pt")
    grid = processor.image_layout((64, 96)).tile_grid
    assert (grid.rows, grid.cols) == (2, 3)
    cells = inputs["region_cells"][0].view(grid.num_tiles, 8, 8)
    assert (cells[[0, 3]] == 1).all()
    assert (cells[[1, 4], :, :4] == 1).all()
    assert not cells[[1, 4], :, 4:].any()
    assert not cells[[2, 5, 6]].any()  # the right third, and the thumbnail
    assert inputs["region_first_tile"].tolist() == [0]


@pytest.mark.parametrize("mode", ["slice", "pad", "square"])
@pytest.mark.parametrize("size", [(64, 96), (50, 31), (33, 200)])
def test_masks_go_where_the_pixels_go(region_model, size, mode):
    """A white rectangle on black is its own mask: a patch's weight is its mean brightness."""
    _, processor = region_model
    images = copy.deepcopy(processor.image_processor)
    images.image_mean, images.image_std = [0.0] * 3, [1.0] * 3  # so that padding is black, too
    mask = np.zeros(size, dtype=bool)
    mask[size[0] // 4 : size[0] * 3 // 4, size[1] // 3 : size[1] * 2 // 3] = True
    picture = Image.fromarray(np.repeat(mask[..., None] * np.uint8(255), 3, axis=2))
    images = images.with_options(image_mode=mode)
    grid = images.choose_grid(size)
    tiles = images.preprocess(picture, tile_grids=[grid], image_mode=mode)["pixel_values"]
    shown = torch.nn.functional.avg_pool2d(tiles[:, :1], 4).flatten(1)[: grid.rows * grid.cols]
    cells = Canvas(images, size, grid, (8, 8)).weights(mark_region(mask, size), "coverage")[: grid.rows * grid.cols]
    assert cells.any()
    # interpolation blurs the picture's edges by up to two of its pixels, which may be half a patch wide
    assert (shown - cells).abs().mean() < 0.04
    assert shown.sum().item() == pytest.approx(cells.sum().item(), rel=0.05)


def test_the_released_rule_takes_a_patch_by_its_centre(region_model, image_of):
    model, processor = region_model
    released = TokenPackerProcessor.from_config(
        model.config, processor.tokenizer, region_rule="centre", **RELEASED_OPTIONS
    )
    mask = np.zeros((32, 32), dtype=bool)
    mask[1, 2], mask[8, 8] = True, True  # a centre pixel of the first patch, and a corner of another
    cells = released(image_of(32, 32), "<image><mask>", region_masks=[[mask]], return_tensors="pt")["region_cells"]
    assert cells.sum() == cells[0, 0, 0] == 1


@pytest.mark.parametrize(
    ("texts", "regions", "message"),
    [
        (["<image><mask>"], None, "the prompt needs as many <mask> markers as regions: 1 markers, 0 regions"),
        (["<image>what?"], [[BOX]], "0 markers, 1 regions; write <mask> once for each region"),
        (["<image><mask><mask>"], [[BOX]], "2 markers, 1 regions"),
        (["<image><mask>", "<image>"], [[], [BOX]], "prompt 1 needs .* 1 markers, 0 regions"),
        (["<image><mask>"], [[BOX], [BOX]], "region_masks has 2 entries for 1 images; pass one list of regions"),
        (["<image><mask>"] * 2, BOX, "region_masks has 1 entries for 2 images"),
        (["<image><mask>"], 7, "region_masks has int for 1 images"),
        (["<image><mask><mask>"], [[BOX, (50, 0, 60, 9)]], r"region 2 of image 1 reaches from \(50, 0\)"),
        (["<image><mask>"], [np.zeros((32, 32), bool)], "region 1 of image 1 has no pixel set"),
        (["<image><mask>"], [np.ones((32, 16), bool)], "region 1 of image 1 is 32x16 but its image is 32x32"),
        (["<image><mask>"], [np.ones((32, 32, 1), bool)], r"an array of 32x32x1, .* pass mask\[\.\.\., 0\]"),
        (["<image><mask>"], [np.ones((32, 32, 3), bool)], r"an array of 32x32x3, .* pass mask\.any\(-1\)"),
        (["<image><mask>"], [5], r"region 1 of image 1 is given as numbers, \(5\); use a"),
        (
            ["<image><mask>"] * 2,
            [[[BOX]], [[BOX]]],
            "4 numbers; .*; region_masks has one list per image, not per prompt",
        ),
        (["<image><mask>"], [[[0, 1, 0, 1, 1]] * 5], "regions are given as nested lists of 0 and 1; pass an array"),
        (["<image><mask>"], [[[[0, 1, 0, 1, 1]] * 5]], "region 1 of image 1 is given as nested lists of 0 and 1"),
        (["<image><mask>"], [np.ones((32, 32))], "region 1 of image 1 is an array of float64; pass booleans"),
    ],
)
def test_markers_and_regions_must_agree_and_masks_must_fit(region_model, image_of, texts, regions, message):
    _, processor = region_model
    with pytest.raises(ValueError, match=message):
        processor([[image_of(32, 32)] for _ in texts], texts, region_masks=regions)


@pytest.mark.parametrize("rule", ["coverage", "centre"])
def test_a_region_that_the_square_crop_cuts_off_is_refused(region_model, image_of, rule):
    processor = with_rule(region_model, rule)
    with pytest.raises(
        ValueError,
        match=r"region 1 of image 1 lies where no patch sees it: .*image_mode='square' cuts",
    ):
        processor(image_of(32, 96), "<image><mask>", region_masks=[[(0, 0, 20, 32)]], image_mode="square")


@pytest.mark.parametrize("rule", ["coverage", "centre"])
def test_a_region_behind_a_tiles_last_whole_patch_is_refused(rule):
    """A tile of 30 pixels has 8 patches of 3; the last 6 pixels are in none."""
    with pytest.raises(ValueError, match="region 1 of image 1 lies where no patch sees it: beyond a tile's last"):
        weights_of([(25, 0, 30, 30)], (30, 30), "slice", (30, 30), rule)
    assert weights_of([(20, 0, 30, 30)], (30, 30), "slice", (30, 30), "coverage").any()


def test_by_the_released_rule_a_region_may_be_seen_and_yet_hit_no_centre(region_model, image_of):
    processor = with_rule(region_model, "centre")
    inputs = processor(image_of(32, 32), "<image><mask>", region_masks=[[(0, 0, 1, 32)]], return_tensors="pt")
    assert not inputs["region_cells"].any()


def test_regions_for_a_sample_of_training_are_counted_from_its_own_tiles(region_model):
    _, processor = region_model
    grids = [TileGrid(1, 2), TileGrid(1, 1)]
    made = processor.region_inputs([[], [BOX]], [(32, 64), (32, 32)], grids)
    assert made["region_first_tile"].tolist() == [3]
    assert made["region_cells"].shape == (1, 1, 64)
    for none in (processor.region_inputs(None, [(32, 64), (32, 32)], grids), processor.region_inputs([], [], [])):
        assert (none["region_cells"].shape, none["region_first_tile"].shape) == ((0, 1, 64), (0,))
