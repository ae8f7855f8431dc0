"""`tokenpacker data regions` and `data show`, and their rows in the other commands."""

from __future__ import annotations

import json

import pytest
from PIL import Image

ENTRIES = [
    {
        "id": number,
        "file_name": f"{number}.png",
        "annotation": [{"segmentation": [[2, 2, 20, 2, 20, 20]]}],
        "conversations": [{"from": "human", "value": "What is <region1>?"}, {"from": "gpt", "value": "It."}],
    }
    for number in range(4)
]


@pytest.fixture
def annotations(tmp_path, image_of):
    """Four entries of Osprey-724K, the last without its image."""
    (tmp_path / "coco").mkdir()
    for number in range(3):
        image_of(30, 40, seed=number).save(tmp_path / "coco" / f"{number}.png")
    path = tmp_path / "short.json"
    path.write_text(json.dumps(ENTRIES))
    return path


@pytest.fixture
def options(tmp_path, annotations):
    """What makes rows of them."""
    folders = ("--images", tmp_path / "coco", "--root", tmp_path)
    return ("data", "regions", "osprey-short", annotations, *folders, "--output", tmp_path / "rows.jsonl")


def test_it_tells_rows_regions_and_rejects(run, options, tmp_path):
    result = run(*options, "--max-rejects", 0.5)
    assert result.exit_code == 0, result.output
    assert f"3 rows with 3 regions in {tmp_path / 'rows.jsonl'}" in result.stdout
    assert "1 rejected: missing image" in result.stdout
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 3


def test_more_rejects_than_tolerated_are_exit_code_1(run, options):
    result = run(*options)
    assert result.exit_code == 1
    assert "25.00% rejected, named in" in result.stdout


def test_as_json_it_is_one_object(run_json, options, tmp_path):
    told = run_json(*options, "--max-rejects", 1)
    assert (told["rows"], told["regions"], told["rejected"], told["passes"]) == (3, 3, {"missing image": 1}, True)
    assert told["rejects"] == str(tmp_path / "rows.jsonl.rejects.jsonl")


def test_the_formats_are_listed(run, run_json):
    from tokenpacker.data.annotations import FORMATS

    assert [line.split()[0] for line in run("data", "regions", "list").stdout.splitlines()] == list(FORMATS)
    assert run_json("data", "regions", "list")["visual-genome"]["max_regions"] == 3


def test_mistakes_are_told_in_one_line(one_line_error, options, annotations):
    assert "format 'osprey' is unknown; use one of coco" in one_line_error("data", "regions", "osprey", *options[3:])
    assert "--images and --output are needed" in one_line_error("data", "regions", "coco", annotations)
    assert "gives no row as osprey-detail" in one_line_error("data", "regions", "osprey-detail", *options[3:])


def test_a_row_can_be_drawn(run, run_json, one_line_error, options, tmp_path):
    run(*options, "--max-rejects", 1)
    page = tmp_path / "new" / "page.png"
    result = run("data", "show", tmp_path / "rows.jsonl", "--row", 2, "--out", page)
    assert result.exit_code == 0, result.output
    assert Image.open(page).width > 600
    shown = run_json("data", "show", tmp_path / "rows.jsonl", "--row", 3, "--out", page)
    assert shown == {"page": str(page), "row": 3, "rows": 3}
    assert "has the rows 1 to 3" in one_line_error("data", "show", tmp_path / "rows.jsonl", "--row", 4, "--out", page)


def test_a_region_recipe_takes_the_rows_and_a_model_that_knows_no_regions(
    run, run_json, options, tmp_path, tiny_model_dir
):
    run(*options, "--max-rejects", 1)
    settings = ("--set", "precision=float32", "--set", "data.num_workers=0")
    shown = run_json(
        "train", "region-7b-hd9", "--data", tmp_path / "rows.jsonl", "--start", tiny_model_dir, *settings, "--dry-run"
    )
    assert (shown["samples"]["used"], shown["samples"]["regions"], shown["steps"]) == (3, 3, 1)
    assert shown["parameters"]["regions"]["frozen"] == 0
    assert shown["parameters"]["language_model"]["trainable"] == shown["parameters"]["projector"]["trainable"] == 0


def test_a_model_that_knows_no_regions_rejects_them_unless_it_shall_learn_them(
    run_json, options, tmp_path, tiny_model_dir, run
):
    run(*options, "--max-rejects", 1)
    result = run("data", "check", tmp_path / "rows.jsonl", "--model", tiny_model_dir, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["rejected"] == {"regions and marks differ": 3}
    told = run_json("data", "check", tmp_path / "rows.jsonl", "--model", tiny_model_dir, "--regions")
    assert (told["usable"], told["with_regions"], told["regions"]["max"]) == (3, 3, 1)
