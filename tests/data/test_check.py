from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from tar_shards import write_tar
from tokenpacker.data.check import check_data, describe, draw_report
from tokenpacker.data.samples import SampleMaker
from tokenpacker.data.sources import open_data
from tokenpacker.visualize import ACCENT


@pytest.fixture
def maker(tiny_processor):
    return SampleMaker(tiny_processor)


def row(number, num_images, words=1):
    talk = [{"from": "human", "value": "<image>\n" * num_images + "what? " * words}, {"from": "gpt", "value": "a cat"}]
    return {"id": f"row{number}", "image": ["a.png"] * num_images, "conversations": talk}


@pytest.fixture
def data(tmp_path, image_of):
    """Ten rows: six with an image, one with two, two of text, and a bad one."""
    image_of(40, 90).save(tmp_path / "a.png")
    rows = [row(number, 1, number + 1) for number in range(6)] + [row(6, 2), row(7, 0), row(8, 0)]
    path = tmp_path / "data.json"
    path.write_text(json.dumps([*rows, {"id": "bad", "image": "../x", "conversations": []}]))
    return path


def test_it_counts_what_the_data_holds(data, maker, tmp_path):
    records = open_data([data])
    report = check_data(records, maker, rejects=tmp_path / "rejects.jsonl")
    lengths = [maker.length(records[number]) for number in range(9)]
    assert (report.samples, report.usable, report.with_images, report.multi_image, report.text_only) == (10, 9, 7, 1, 2)
    assert report.tokens.total == sum(length.tokens for length in lengths)
    assert report.tokens.median == np.median([length.tokens for length in lengths])
    assert report.image_tokens.mean == round(np.mean([length.image_tokens for length in lengths[:7]]), 2)
    assert report.tiles == {0: 2, lengths[0].tiles: 6, lengths[6].tiles: 1}
    assert report.rejected == {"unsafe path": 1}
    assert report.examples["unsafe path"][0][0] == "bad"
    assert json.loads((tmp_path / "rejects.jsonl").read_text())["id"] == "bad"
    assert json.loads(json.dumps(report.to_dict()))["rejected_share"] == 0.1


def test_the_histogram_holds_every_usable_sample_once(data, maker):
    report = check_data(open_data([data]), maker)
    assert sum(count for *_, count in report.histogram) == report.usable
    bounds = [(first, last) for first, last, _ in report.histogram]
    assert all(after[0] == before[1] + 1 for before, after in itertools.pairwise(bounds))
    assert bounds[0][0] <= report.tokens.max <= bounds[-1][1]


def test_it_passes_up_to_the_share_and_not_beyond(data, maker):
    assert check_data(open_data([data]), maker, max_share=0.1).passes
    assert not check_data(open_data([data]), maker, max_share=0.09).passes


def test_data_of_which_nothing_is_usable_never_passes(tmp_path, maker):
    path = tmp_path / "data.jsonl"
    path.write_text("{}\n{}\n")
    report = check_data(open_data([path]), maker, max_share=1.0)
    assert (report.usable, report.passes) == (0, False)
    assert "2 malformed conversation" in describe(report)
    assert draw_report(report, "nothing").size[0] > 0


def test_a_sample_of_the_data_is_the_same_for_a_seed(data, maker):
    first, second = (check_data(open_data([data]), maker, num_samples=4, seed=seed) for seed in (1, 1))
    assert first.to_dict() == second.to_dict()
    assert first.samples == 4
    assert check_data(open_data([data]), maker, num_samples=99).samples == 10
    with pytest.raises(ValueError, match="num_samples=0"):
        check_data(open_data([data]), maker, num_samples=0)


def test_shards_are_checked_as_files_are(data, maker, tmp_path):
    pytest.importorskip("webdataset")
    picture = (tmp_path / "a.png").read_bytes()
    content = {}
    for entry in json.loads(data.read_text()):
        content[f"{entry['id']}.json"] = json.dumps(entry).encode()
        places = range(len(entry["image"])) if entry["id"] != "bad" else ()
        content |= {f"{entry['id']}.{place}.png": picture for place in places}
    write_tar(tmp_path / "0.tar", content)
    shards, files = (check_data(open_data([path]), maker).to_dict() for path in (tmp_path / "0.tar", data))
    assert shards["rejected"] == {"malformed conversation": 1}  # a shard has no paths to be unsafe
    for key in ("samples", "usable", "multi_image", "tokens", "image_tokens", "tiles", "histogram"):
        assert shards[key] == files[key]
    assert check_data(open_data([tmp_path / "0.tar"]), maker, num_samples=3).samples == 3
    with pytest.raises(ValueError, match="images_root"):
        open_data([tmp_path / "0.tar"], tmp_path)


def test_the_text_says_it_all(data, maker):
    report = check_data(open_data([data]), maker)
    text = describe(report)
    assert "9: 7 with images (1 with several), 2 text only" in text
    assert "rejected     1 (10.00%; at most 1.00% are tolerated)" in text
    assert "bad: image path '../x' leads out of" in text
    assert text.count("█") >= report.usable
    assert "--decode" in text
    assert "--decode" not in describe(check_data(open_data([data]), maker, decode=True))


def test_the_picture_has_a_bar_for_each_filled_bin(data, maker):
    report = check_data(open_data([data]), maker)
    pixels = np.asarray(draw_report(report, "data.json"))
    accent = (pixels == ACCENT).all(axis=-1)
    just_above_the_axis = accent[np.flatnonzero(accent.any(axis=1))[-1]].astype(int)
    bars = int((np.diff(just_above_the_axis) == 1).sum()) + int(just_above_the_axis[0])
    assert bars == sum(count > 0 for *_, count in report.histogram)
