from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from tokenpacker.cli.model_files import Geometry


def test_counts_equal_the_length_that_the_processor_really_uses(run_json, tiny_model_dir, tiny_processor, picture):
    counted = run_json("count", picture, "--model", tiny_model_dir)["images"][0]
    used = tiny_processor(images=Image.open(picture), text="<image>", add_special_tokens=False)
    assert counted["tokens"] == len(used["input_ids"][0])
    assert (counted["height"], counted["width"]) == (60, 90)
    assert counted["tiles"] == counted["rows"] * counted["cols"] + 1
    assert counted["image"] == str(picture)


def test_sizes_from_the_command_line_and_from_standard_input_agree(run_json):
    given = run_json("count", "--paper", "--size", "480x640", "--size", "1080x1920")
    read = run_json("count", "--paper", "--size", "-", input="480x640\n\n1080 x 1920\n")
    assert given == read
    assert given["tokens"] == sum(image["tokens"] for image in given["images"])


def test_the_paper_geometry_gives_the_paper_counts(run_json):
    square = run_json("count", "--paper", "--size", "336x336")["images"][0]
    assert (square["tiles"], square["tokens"]) == (1, 145)  # 144 and the row's separator
    wide = run_json("count", "--paper", "--size", "336x672", "--scale-factor", 3)["images"][0]
    assert (wide["rows"], wide["cols"], wide["tiles"], wide["tokens"]) == (1, 2, 3, 3 * 65)


def test_limits_bound_the_grid(run_json):
    size = ("count", "--paper", "--size", "2000x2000")
    assert run_json(*size)["images"][0]["tiles"] == 10
    assert run_json(*size, "--max-tiles", 4)["images"][0]["tiles"] == 5
    assert run_json(*size, "--max-image-tokens", 800)["tokens"] <= 800


@pytest.mark.parametrize("limit", [9, 16, 25])
def test_the_released_choice_is_the_originals(run_json, golden, limit):
    rows = json.loads((golden / "hd" / "grid_choice.json").read_text())[str(limit)]["rows"][::100]
    sizes = "".join(f"{height}x{width}\n" for height, width, *_ in rows)
    images = run_json("count", "--released", "--max-tiles", limit, "--size", "-", input=sizes)["images"]
    assert [[image["height"], image["width"], image["rows"], image["cols"]] for image in images] == rows


def test_released_models_take_at_most_nine_tiles_where_nothing_is_said(run_json):
    image = run_json("count", "--released", "--size", "1344x1344", "--scale-factor", 4)["images"][0]
    assert (image["rows"], image["cols"], image["tokens"]) == (3, 3, 10 * 37)


def test_a_limit_that_the_original_does_not_know_is_counted_and_said(run):
    result = run("count", "--released", "--max-tiles", 12, "--size", "336x4032")
    assert result.stdout.splitlines()[1].split()[2:4] == ["1", "9"]
    assert result.stderr.startswith("note: the original has grids for 9, 16 and 25 tiles only; --max-tiles 12 follows")
    assert run("count", "--released", "--max-tiles", 16, "--size", "336x4032").stderr == ""


def test_a_limit_below_one_is_an_error_and_nothing_more(one_line_error):
    message = one_line_error("count", "--released", "--max-tiles", 0, "--size", "5x5")
    assert message == "--max-tiles 0 must be at least 1"


def test_a_model_folder_is_counted_with_its_own_list_of_grids(run_json, tiny_model_dir, tmp_path):
    for name in ("config.json", "processor_config.json"):
        (tmp_path / name).write_text((tiny_model_dir / name).read_text())
    count = ("count", "--model", tmp_path, "--max-tiles", 16, "--size", "32x384")
    assert run_json(*count)["images"][0]["cols"] == 12
    stored = json.loads((tmp_path / "processor_config.json").read_text())
    stored["image_processor"]["grid_list"] = "released"
    (tmp_path / "processor_config.json").write_text(json.dumps(stored))
    assert run_json(*count)["images"][0]["cols"] == 9
    del stored["image_processor"]["grid_list"]  # as version 0.1.0 saved
    (tmp_path / "processor_config.json").write_text(json.dumps(stored))
    assert run_json(*count)["images"][0]["cols"] == 12


def test_the_table_has_one_line_for_each_image(run, picture):
    result = run("count", picture, "--size", "10x20", "--paper")
    header, first, second = result.stdout.splitlines()
    assert header.split() == ["height", "width", "rows", "cols", "tiles", "tokens"]
    assert first.split() == ["60", "90", "2", "3", "7", "1015", str(picture)]  # the score takes the exact aspect
    assert second.split()[:2] == ["10", "20"]


def test_a_rotated_photograph_is_counted_upright(run_json, tmp_path, image_of):
    exif = Image.Exif()
    exif[0x0112] = 6
    image_of(60, 90).save(tmp_path / "rotated.jpg", exif=exif)
    image = run_json("count", tmp_path / "rotated.jpg", "--paper")["images"][0]
    assert (image["height"], image["width"]) == (90, 60)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there is nothing to count; give image files, or --size HxW"),
        (("--size", "640"), "--size: '640' is no size; write HEIGHTxWIDTH in pixels, for example 480x640"),
        (("--size", "0x5"), "--size: '0x5' is no size; write HEIGHTxWIDTH in pixels, for example 480x640"),
        (("--size", "5x5", "--scale-factor", "0"), "--scale-factor 0 must be at least 1, or auto"),
        (("--size", "5x5", "--scale-factor", "99"), "scale_factor=99 exceeds patch_grid=24x24; use at most 24"),
        (("--size", "5x5", "--max-tiles", "0"), "--max-tiles 0 must be at least 1"),
        (("--size", "5x5", "--model", "x"), "--paper and --model exclude each other; leave one out"),
        (("--size", "5x5", "--released"), "--paper and --released exclude each other; leave one out"),
    ],
)
def test_mistakes(one_line_error, arguments, message):
    assert one_line_error("count", "--paper", *arguments) == message


def test_released_and_a_model_exclude_each_other(one_line_error):
    message = one_line_error("count", "--released", "--model", "x", "--size", "5x5")
    assert message == "--released and --model exclude each other; leave one out"


def test_a_budget_below_one_tile_is_refused(one_line_error):
    message = one_line_error("count", "--paper", "--size", "5x5", "--max-image-tokens", 100)
    assert message.startswith("max_image_tokens=100 is too small: one tile costs 145 tokens; raise the budget")


def test_a_bad_line_of_standard_input_is_named(one_line_error):
    message = one_line_error("count", "--paper", "--size", "-", input="5x5\nfive\n")
    assert message.startswith("line 2 of standard input: 'five' is no size")


def test_a_damaged_processor_config_is_named(one_line_error, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "tokenpacker"}')
    (tmp_path / "processor_config.json").write_text("{}")
    message = one_line_error("count", "--size", "5x5", "--model", tmp_path)
    assert message.startswith(f"{tmp_path / 'processor_config.json'} is damaged (KeyError('image_processor'))")


def test_geometry_of_a_saved_model_is_the_processor_s(tiny_model_dir: Path, tiny_processor):
    geometry = Geometry.of_model(tiny_model_dir)
    for size in [(10, 10), (300, 40), (64, 96)]:
        layout = geometry.layout(size, scale_factor=None, max_image_tokens=None, max_tiles=None)
        assert layout == tiny_processor.image_layout(size)


def test_counting_needs_no_weights(run_json, tiny_model_dir, tmp_path):
    for name in os.listdir(tiny_model_dir):
        if not name.endswith(".safetensors"):
            (tmp_path / name).write_bytes((tiny_model_dir / name).read_bytes())
    assert run_json("count", "--size", "32x32", "--model", tmp_path)["tokens"] == 17


def test_auto_counts_what_the_processor_uses(run_json, picture):
    from tokenpacker.hf import TokenPackerProcessor, carried_model_path

    processor = TokenPackerProcessor.from_pretrained(carried_model_path())
    used = processor(Image.open(picture), "<image>", scale_factor="auto", max_image_tokens=20, add_special_tokens=False)
    counted = run_json("count", picture, "--scale-factor", "auto", "--max-image-tokens", 20)
    assert counted["tokens"] == len(used["input_ids"][0]) <= 20


def test_auto_needs_pixels_and_a_router(one_line_error, picture, tiny_model_dir):
    assert "--size has no pixels, by which" in one_line_error("count", "--size", "9x9", "--scale-factor", "auto")
    for model in ("--paper",), ("--model", tiny_model_dir):
        assert "has no router" in one_line_error("count", picture, *model, "--scale-factor", "auto")
