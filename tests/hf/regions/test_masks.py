import json
import re
import time

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tokenpacker.hf.regions.masks import SHARE_TOLERANCE, read_mask, split_regions, to_mask
from tokenpacker.images import ImageError

SIZE = (6, 8)  # height, width
BLOCK = np.zeros(SIZE, dtype=bool)
BLOCK[1:4, 2:7] = True
BLOCK_RUNS = [13, 3, 3, 3, 3, 3, 3, 3, 3, 3, 8]  # column by column


def packed(runs) -> str:
    """COCO's text form of runs, as its description says it is written."""
    text = ""
    for place, run in enumerate(runs):
        value = run - runs[place - 2] if place > 2 else run
        while True:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text += chr((bits | (32 if more else 0)) + 48)
            if not more:
                break
    return text


def runs_of(mask) -> list[int]:
    """Lengths of runs of 0 and 1 in turn, column by column, zeros first."""
    flat = np.concatenate([[0], mask.T.ravel().astype(int), [-1]])
    changes = np.flatnonzero(np.diff(flat))
    return np.diff(np.concatenate([[0], changes])).tolist()


FORMS = {
    "array": BLOCK,
    "zeros and ones": BLOCK.astype(np.uint8),
    "tensor": torch.from_numpy(BLOCK),
    "picture": Image.fromarray(BLOCK),
    "grey picture": Image.fromarray(BLOCK.astype(np.uint8) * 200),
    "picture of two colours": Image.fromarray(BLOCK[..., None] * np.array([250, 0, 7], np.uint8)),
    "blue picture": Image.fromarray(BLOCK[..., None] * np.array([0, 0, 1], np.uint8)),
    "opaque picture": Image.fromarray(BLOCK).convert("RGBA"),
    "palette picture": Image.fromarray(BLOCK).convert("RGB").quantize(2),
    "flipped array": BLOCK[::-1].copy()[::-1],
    "runs": {"size": [6, 8], "counts": BLOCK_RUNS},
    "packed runs": {"size": [6, 8], "counts": packed(BLOCK_RUNS)},
    "packed runs as bytes": {"size": [6, 8], "counts": packed(BLOCK_RUNS).encode()},
    "box": (2, 1, 7, 4),
    "packed runs of a size in an array": {"size": np.array([6, 8]), "counts": packed(BLOCK_RUNS)},
    "runs in a tensor": {"size": torch.tensor([6, 8]), "counts": torch.tensor(BLOCK_RUNS)},
    "box as an array": np.array([2.0, 1.0, 7.0, 4.0]),
    "box of a tensor's numbers": tuple(torch.tensor([2.0, 1.0, 7.0, 4.0])),
    "polygon": [[2, 1, 7, 1, 7, 4, 2, 4]],
    "polygon of one part": [2, 1, 7, 1, 7, 4, 2, 4],
    "polygon of two parts": [[2, 1, 4, 1, 4, 4, 2, 4], [7, 4, 3, 4, 3, 1, 7, 1]],
    "polygon of one part in a tensor": [torch.tensor([2, 1, 7, 1, 7, 4, 2, 4])],
    "box by name": {"box": [2, 1, 7, 4]},
    "array of a box by name": {"box": np.array([2, 1, 7, 4])},
    "tensor of a box by name": {"box": torch.tensor([2, 1, 7, 4])},
    "array of a polygon by name": {"polygon": [np.array([2, 1, 7, 1, 7, 4, 2, 4])]},
    "tensor of parts by name": {"polygon": torch.tensor([[2, 1, 7, 1, 7, 4, 2, 4]])},
    "polygon by name": {"polygon": [[2, 1, 7, 1, 7, 4, 2, 4]]},
    "runs by name": {"rle": {"size": [6, 8], "counts": BLOCK_RUNS}},
    "array by name": {"mask": BLOCK},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_region_gives_the_same_mask(form):
    mask = to_mask(FORMS[form], SIZE)
    assert mask.dtype == bool
    assert np.array_equal(mask, BLOCK)


def test_a_mask_is_read_from_a_file_and_what_is_not_black_is_marked(tmp_path):
    path = tmp_path / "mask.png"
    Image.fromarray(BLOCK.astype(np.uint8) * 255).save(path)
    assert np.array_equal(read_mask(path), BLOCK)
    assert np.array_equal(to_mask(str(path), SIZE), BLOCK)
    assert np.array_equal(to_mask({"mask": str(path)}, SIZE), BLOCK)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31), st.sampled_from([0.1, 0.5, 1.0]))
def test_runs_are_decoded_whether_packed_or_not(height, width, seed, share):
    mask = np.random.default_rng(seed).random((height, width)) < share
    mask[seed % height, seed % width] = True
    runs = runs_of(mask)
    for counts in (runs, packed(runs), packed(runs).encode()):
        assert np.array_equal(to_mask({"size": [height, width], "counts": counts}, (height, width)), mask)


def test_long_runs_are_decoded():
    runs = [100_000, 70_000, 129_999, 1]
    mask = to_mask({"size": [500, 600], "counts": packed(runs)}, (500, 600))
    assert runs_of(mask) == runs


JUNK = {
    "single pixels": (
        "1" * 3 + "0" * 5_999_997,
        "is an RLE of 6000000 runs; at most 1048576 are read: pass a boolean array",
    ),
    "empty text": ("0" * 6_000_010, "more runs than pixels, 6000010 for 6000000"),
    "empty list": ([0] * 6_000_010, "more runs than pixels, 6000010 for 6000000"),
    "a number without end": ("o" * 30_000_000, "character 10 of its counts cannot stand there"),
}


@pytest.mark.parametrize("what", JUNK)
def test_junk_of_millions_of_runs_is_refused_at_once(what):
    counts, told = JUNK[what]
    start = time.process_time()
    with pytest.raises(ValueError, match=told):
        to_mask({"size": [2000, 3000], "counts": counts}, (2000, 3000))
    assert time.process_time() - start < 1  # 0.2 s at most; read run by run it was 3 to 6


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=[chr(code) for code in range(40, 120)], max_size=30))
def test_text_that_is_no_run_length_code_never_gives_a_mask_of_another_size(text):
    try:
        mask = to_mask({"size": list(SIZE), "counts": text}, SIZE)
    except ValueError as error:
        mask, message = None, str(error)
    assert mask.shape == SIZE if mask is not None else "broken RLE" in message or "no pixel set" in message


def inside_by_even_odd(x, y, outline):
    """Whether a ray to the right crosses the outline oddly."""
    points, odd = list(zip(outline[::2], outline[1::2], strict=True)), False
    for edge in zip(points, [*points[1:], points[0]], strict=True):
        (x0, y0), (x1, y1) = sorted(edge, key=lambda point: point[1])
        if y0 <= y < y1 and x < x0 + (y - y0) * ((x1 - x0) / (y1 - y0)):
            odd = not odd
    return odd


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(-3, 11), st.floats(-3, 9)), min_size=3, max_size=7))
def test_a_polygon_marks_the_pixels_whose_centre_is_inside_by_the_even_odd_rule(points):
    outline = [value for point in points for value in point]
    assume(not all(-SHARE_TOLERANCE <= value <= 1 + SHARE_TOLERANCE for value in outline))  # refused, as shares
    expected = np.array([[inside_by_even_odd(x + 0.5, y + 0.5, outline) for x in range(8)] for y in range(6)])
    if expected.any():
        assert np.array_equal(to_mask([outline], SIZE), expected)


def test_a_self_crossing_polygon_has_a_hole_where_it_winds_twice():
    twice = [0, 0, 6, 0, 6, 6, 0, 6, 0, 0, 2, 2, 4, 2, 4, 4, 2, 4, 2, 2]
    mask = to_mask([twice], (6, 6))
    assert not mask[2:4, 2:4].any()
    assert mask.sum() == 36 - 4


def test_a_polygon_thinner_than_a_pixel_marks_the_pixels_of_its_corners():
    mask = to_mask([[1.1, 1.1, 5.2, 1.2, 3.0, 1.15]], SIZE)
    assert np.argwhere(mask).tolist() == [[1, 1], [1, 3], [1, 5]]


def test_a_box_marks_all_that_it_touches_and_is_cut_at_the_edge():
    assert np.argwhere(to_mask((2.9, 1.9, 3.1, 2.1), SIZE)).tolist() == [[1, 2], [1, 3], [2, 2], [2, 3]]
    assert to_mask((-10, -10, 100, 100), SIZE).all()


def test_small_boxes_and_polygons_in_pixels_are_none_in_shares():
    assert to_mask((0, 0, 2, 1), SIZE).sum() == 2
    assert to_mask((1, 1, 2, 2), SIZE).sum() == 1
    assert to_mask((-5, -5, 0.5, 0.5), SIZE).sum() == 1
    assert to_mask([[0, 0, 2, 0, 0, 2]], SIZE).sum() == 1
    assert to_mask((0, 0, 1, 1), (1, 1)).all()


def test_the_regions_of_an_image_are_split_without_being_decoded():
    box, polygon, rle = (0, 0, 1, 1), [[0, 0, 1, 0, 1, 1]], {"size": [6, 8], "counts": "broken"}
    assert split_regions(None) == split_regions([]) == []
    assert split_regions([box, polygon, rle]) == [box, polygon, rle]
    assert split_regions(box) == [box]
    assert split_regions(rle) == [rle]
    assert len(split_regions(np.stack([BLOCK, BLOCK]))) == 2
    assert len(split_regions([np.stack([BLOCK, BLOCK]), BLOCK, torch.from_numpy(BLOCK)[None]])) == 4
    assert len(split_regions(BLOCK)) == 1
    boxes = np.array([[2, 1, 7, 4], [1, 0, 2, 1]])
    for table in (boxes, torch.from_numpy(boxes).bfloat16(), [boxes]):
        assert [to_mask(region, SIZE).sum() for region in split_regions(table)] == [15, 1]
    assert split_regions(np.zeros((0, 4), np.float32)) == []
    assert len(split_regions(np.ones((6, 4), dtype=bool))) == len(split_regions(np.ones((6, 4), dtype=int))) == 1
    with pytest.raises(ValueError, match="regions are given as nested lists of 0 and 1; pass an array"):
        split_regions(BLOCK.tolist())
    with pytest.raises(ValueError, match="regions are given as int; pass a list"):
        split_regions(3)


@pytest.mark.parametrize(
    ("channels", "remedy"), [(1, "mask[..., 0]"), (3, "mask.any(-1)"), (4, "mask[..., :3].any(-1)")]
)
def test_an_array_that_may_be_a_picture_or_many_masks_is_refused_with_what_to_pass_for_either(channels, remedy):
    colours = BLOCK[..., None] & (np.arange(channels) < 3)
    told = f"a picture of 6x8 in {channels} channels or 6 masks of 8x{channels}; pass {remedy} for a picture, list"
    for picture in (colours, torch.from_numpy(colours)):
        with pytest.raises(ValueError, match=re.escape(told)):
            split_regions(picture)
        assert np.array_equal(to_mask(eval(remedy, {"mask": picture}), SIZE), BLOCK)
        assert len(split_regions(list(picture))) == 6


BROKEN = {
    "empty": (np.zeros(SIZE, bool), "has no pixel set"),
    "no picture": (np.zeros((0, 0), bool), "is 0x0 but its image is 6x8"),
    "picture of no pixel": (Image.new("RGB", (0, 0)), "is 0x0 but its image is 6x8"),
    "wrong size": (BLOCK.T, "is 8x6 but its image is 6x8; masks have the size .* after EXIF rotation"),
    "float": (BLOCK.astype(np.float32), r"is an array of float32; pass booleans, for example mask > 0\.5"),
    "bfloat16": (torch.from_numpy(BLOCK).bfloat16(), "is an array of float32"),
    "colours in an array": ({"mask": BLOCK[..., None] * np.full(3, 255)}, r"is an array of 6x8x3; .*: mask\.any\(-1\)"),
    "labels in an array": (BLOCK.astype(np.uint8) * 3, "holds values from 0 to 3; pass 0 and 1"),
    "black picture": (Image.new("RGB", (8, 6)), "has no pixel set"),
    "grey picture": (
        Image.linear_gradient("L").resize((8, 6)),
        r"holds 6 grey levels, 22, 63, 106, 149, \.\.\.; a mask has 0 and one other: "
        "pass a boolean array of what is meant, or save it as a PNG of two colours",
    ),
    "no black": (Image.fromarray(BLOCK * np.uint8(9) + np.uint8(1)), "holds 2 grey levels, 1, 10; a mask has 0"),
    "labels in colour": (
        Image.fromarray(BLOCK * np.uint8(80) + np.uint8(80)).convert("P"),
        r"holds 2 colours, \(80, 80, 80\), \(160, 160, 160\); a mask has \(0, 0, 0\) and one other",
    ),
    "two colours": (
        Image.fromarray(np.where(BLOCK[..., None], [0, 0, 9], [8, 0, 0]).astype(np.uint8)),
        r"holds 2 colours, \(0, 0, 9\), \(8, 0, 0\); a mask has \(0, 0, 0\) and one other",
    ),
    "photo": (
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (18, 24, 3), np.uint8)),
        "holds more than 256 colours; a mask has black and one other: pass a boolean array .* PNG of two colours",
    ),
    "transparent picture": (Image.new("RGBA", (8, 6)), "is transparent in places; a mask is black where nothing is"),
    "deep picture": (Image.new("I;16", (8, 6)), "is a picture of mode I;16; a mask is black and one other colour"),
    "nested lists": (BLOCK.astype(int).tolist(), "is given as nested lists of 0 and 1; pass an array, np.array"),
    "nested lists of booleans": (BLOCK.tolist(), "is given as nested lists of 0 and 1"),
    "box outside": ((8, 0, 9, 2), r"reaches from \(8, 0\) to \(9, 2\), outside of its image of 8 x 6"),
    "box turned": ((3, 3, 1, 5), r"is the box \(3, 3, 1, 5\); give \(x0, y0, x1, y1\) with x1 > x0"),
    "box of COCO": ((5, 3, 2, 2), r"COCO writes it, is \(x, y, x \+ width, y \+ height\) here"),
    "box of shares": (
        (0.25, 0.1, 0.75, 1),
        r"has all coordinates between 0 and 1, \(0\.25, 0\.1, 0\.75, 1\); give pixels: multiply x by the width 8 and y"
        r" by the height 6 \(for the first pixel itself, pass a mask\)",
    ),
    "box of all": (
        {"box": np.array([-0.003, 0, 1, 1.004])},
        "all coordinates between 0 and 1, .* give pixels: multiply",
    ),
    "polygon of shares": (
        [[0.1, 0.1, 0.9, 0.1, 0.5, 0.9]],
        r"between 0 and 1, \(0\.1, 0\.1, 0\.9, 0\.1, \.\.\.\); give",
    ),
    "polygons of shares": ({"polygon": [[0, 0, 1, 0, 1, 1], [0.2, 0.2, 0.3, 0.2, 0.3, 0.3]]}, "between 0 and 1, "),
    "box of no number": ((0, 0, float("nan"), 2), "has the coordinate nan"),
    "endless box": ((0, 0, float("inf"), 2), "has the coordinate inf"),
    "polygon outside": ([[-5, 0, -1, 0, -1, 4]], "outside of its image"),
    "polygon beside a corner": ([[-3, 3, 3, -3, -3, -3]], "is a polygon without a pixel in its image"),
    "two points": ([[1, 1, 2, 2]], "has a polygon of 4 numbers; write at least three points"),
    "box in a list for a prompt": (
        [(2, 1, 7, 4)],
        "4 numbers; .*; region_masks has one list per image, not per prompt",
    ),
    "mask in a list for a prompt": ([BLOCK], "; region_masks has one list per image, not per prompt"),
    "half a point": ([[1, 1, 2, 2, 3, 3, 4]], "has a polygon of 7 numbers"),
    "huge polygon": ([[0, 0, 1e300, 0, 0, 1e300]], r"has the coordinate 1e\+300"),
    "points": ([[(1, 1), (2, 2), (3, 1)]], r"has a polygon of \[\(1, 1\), \(2, 2\), \(3, 1\)\]"),
    "three numbers": ([1, 2, 3], r"is given as numbers, \(1, 2, 3\); use a"),
    "nothing": ([], "is an empty list; use a"),
    "text": ({"box": "1,2,3,4"}, "has box=1,2,3,4, which is none"),
    "unknown key": ({"circle": (1, 2, 3)}, r"has the keys \['circle'\]; write one of box, polygon, rle, mask"),
    "two keys": ({"box": (0, 0, 1, 1), "mask": BLOCK}, r"has the keys \['box', 'mask'\]"),
    "number": (7, "is given as int; use a"),
    "runs of another size": ({"size": [8, 6], "counts": BLOCK_RUNS}, "is an RLE of size .* but its image is 6x8"),
    "runs of a nested size": ({"size": [np.array([6, 8])] * 2, "counts": BLOCK_RUNS}, "is an RLE of size .* but"),
    "no size": ({"counts": BLOCK_RUNS}, "is an RLE of size None"),
    "too many pixels": ({"size": [6, 8], "counts": [40, 9]}, "runs that add up to more, where 6x8 has 48 pixels"),
    "too few pixels": ({"size": [6, 8], "counts": [30, 9]}, "runs that add up to 39, where 6x8 has 48 pixels"),
    "huge runs": ({"size": [6, 8], "counts": [10**9999]}, "broken RLE: runs that add up to more"),
    "too many pixels in text": ({"size": [6, 8], "counts": packed([40, 9])}, "runs that add up to more, where 6x8"),
    "empty runs without end": ({"size": [6, 8], "counts": "0" * 51 + "not read"}, "more runs than pixels"),
    "run below zero": ({"size": [6, 8], "counts": [30, -2]}, "broken RLE: a run below 0"),
    "fractions": ({"size": [6, 8], "counts": [40.5, 7.5]}, "neither text nor whole numbers"),
    "cut text": ({"size": [6, 8], "counts": packed([40, 8])[:1]}, "its counts end within a number"),
    "foreign text": ({"size": [6, 8], "counts": "0 0"}, "character 2 of its counts cannot stand there"),
    "endless number": ({"size": [6, 8], "counts": "o" * 50}, "character 10 of its counts cannot stand there"),
    "runs of zero only": ({"size": [6, 8], "counts": [48]}, "has no pixel set"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_region_that_cannot_be_is_told_in_one_line(what):
    region, message = BROKEN[what]
    with pytest.raises(ValueError, match=rf"^region 2 of image 1 .*{message}|^region 2 of image 1 {message}") as error:
        to_mask(region, SIZE, "region 2 of image 1")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("format", ["TIFF", "PNG"])
def test_a_mask_file_is_turned_as_its_exif_says_whatever_texts_it_carries(tmp_path, format):
    mask = np.zeros((6, 9), dtype=bool)
    mask[1:3, 4:8] = True
    exif = Image.Exif()
    exif[0x0112] = 6
    texts = PngInfo()
    texts.add_text("Comment", "words " * 400_000, zip=True)
    options = {"pnginfo": texts} if format == "PNG" else {}
    Image.fromarray(mask).save(tmp_path / "mask", format, exif=exif, **options)
    assert np.array_equal(read_mask(tmp_path / "mask"), np.rot90(mask, -1))


def test_a_mask_file_that_cannot_be_used_is_named(tmp_path):
    with pytest.raises(ImageError, match=r"mask .*no\.png does not exist; check the path"):
        read_mask(tmp_path / "no.png")
    (tmp_path / "text.png").write_text(json.dumps("hello"))
    with pytest.raises(ImageError, match=r"mask .*text\.png is not an image that Pillow can read; give a PNG"):
        read_mask(tmp_path / "text.png")
    Image.new("1", (800, 600)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:70])
    with pytest.raises(ImageError, match=r"mask .*cut\.png cannot be read .* give a black-and-white PNG file"):
        read_mask(tmp_path / "cut.png")
    Image.new("RGBA", (8, 6)).save(tmp_path / "colour.png")
    with pytest.raises(ImageError, match=r"colour\.png is transparent in places"):
        read_mask(tmp_path / "colour.png")
