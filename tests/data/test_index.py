from __future__ import annotations

import json
import os

import numpy as np
import pytest

from tokenpacker.data import index as index_module
from tokenpacker.data.index import index_lengths
from tokenpacker.data.records import open_records
from tokenpacker.data.rejects import Rejects, TooManyRejects
from tokenpacker.data.samples import Length, SampleMaker


@pytest.fixture
def maker(tiny_processor):
    return SampleMaker(tiny_processor)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(index_module, "CHUNK", 4)


@pytest.fixture
def data(tmp_path, image_of):
    """Eleven rows: every third without an image, number 5 with two, number 7 with a missing one, number 9 damaged."""
    for size in ((32, 32), (40, 90)):
        image_of(*size).save(tmp_path / f"{size[0]}.png")
    content = (tmp_path / "40.png").read_bytes()
    (tmp_path / "half.png").write_bytes(content[: len(content) // 2])
    rows = []
    for number in range(11):
        images = {5: ["32.png", "40.png"], 7: ["gone.png"], 9: ["half.png"]}.get(
            number, [] if number % 3 == 0 else ["40.png"]
        )
        question = "<image>\n" * len(images) + "what?" * number
        talk = [{"from": "human", "value": question or "hello?"}, {"from": "gpt", "value": "a cat"}]
        rows.append({"id": number, "image": images, "conversations": talk})
    path = tmp_path / "data.json"
    path.write_text(json.dumps(rows))
    return path


class Counted:
    """Records that count how often they are read."""

    def __init__(self, records):
        self._records, self.files, self.images_root = records, records.files, records.images_root
        self.read = []

    def __len__(self):
        return len(self._records)

    def where(self, number):
        return self._records.where(number)

    def __getitem__(self, number):
        self.read.append(number)
        return self._records[number]


def equal(first, second):
    fields = ("tokens", "image_tokens", "tiles", "images")
    same = all(np.array_equal(getattr(first, name), getattr(second, name)) for name in fields)
    return same and {n: vars(e) for n, e in first.errors.items()} == {n: vars(e) for n, e in second.errors.items()}


def test_lengths_are_those_of_the_samples(data, maker):
    records = open_records(data)
    lengths = index_lengths(records, maker)
    assert lengths.usable.tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10]
    for number in (0, 1, 5, 10):
        assert [getattr(lengths, name)[number] for name in Length._fields] == list(maker.length(records[number]))
    assert lengths.images.tolist() == [0, 1, 1, 0, 1, 2, 0, 0, 1, 1, 1]
    assert len(lengths) == 11


def test_what_cannot_be_used_is_kept_with_its_place_and_counted(data, maker, tmp_path):
    rejects = Rejects(tmp_path / "rejects.jsonl", max_share=0.5)
    lengths = index_lengths(open_records(data), maker, rejects=rejects)
    assert list(lengths.errors) == [7]
    assert (lengths.errors[7].id, lengths.errors[7].kind) == ("7", "missing image")
    assert lengths.errors[7].source == f"{data}, entry 8 in line 1"
    assert (rejects.num_accepted, rejects.counts) == (10, {"missing image": 1})
    assert len((tmp_path / "rejects.jsonl").read_text().splitlines()) == 1


def test_decoding_finds_what_headers_hide(data, maker):
    lengths = index_lengths(open_records(data), maker, decode=True)
    assert {number: error.kind for number, error in lengths.errors.items()} == {
        7: "missing image",
        9: "unreadable image",
    }


def test_some_numbers_can_be_looked_at_alone(data, maker):
    records = open_records(data)
    whole, some = index_lengths(records, maker), index_lengths(records, maker, numbers=[9, 7, 2])
    assert some.tokens.tolist() == whole.tokens[[9, 7, 2]].tolist()
    assert list(some.errors) == [1]


def test_a_cache_gives_the_same_without_reading(data, maker, tmp_path, small_chunks):
    first = index_lengths(open_records(data), maker, cache=tmp_path / "cache")
    again = Counted(open_records(data))
    rejects = Rejects(None, max_share=0.5)
    assert equal(index_lengths(again, maker, cache=tmp_path / "cache", rejects=rejects), first)
    assert again.read == []
    assert rejects.counts == {"missing image": 1}


def test_an_interrupted_index_goes_on_where_it_stopped(data, maker, tmp_path, small_chunks):
    class Interrupted(Counted):
        def __getitem__(self, number):
            if number == 6:
                raise KeyboardInterrupt
            return super().__getitem__(number)

    with pytest.raises(KeyboardInterrupt):
        index_lengths(Interrupted(open_records(data)), maker, cache=tmp_path / "cache")
    resumed = Counted(open_records(data))
    lengths = index_lengths(resumed, maker, cache=tmp_path / "cache")
    assert resumed.read == [4, 5, 6, 7, 8, 9, 10]
    assert equal(lengths, index_lengths(open_records(data), maker))


@pytest.mark.parametrize("damage", [b"", b"nonsense", None], ids=["empty", "nonsense", "a flipped bit"])
def test_a_damaged_chunk_is_made_again(data, maker, tmp_path, small_chunks, damage):
    first = index_lengths(open_records(data), maker, cache=tmp_path / "cache")
    [chunk] = (tmp_path / "cache").glob("*/chunk-000001.npz")
    if damage is None:
        content = bytearray(chunk.read_bytes())
        content[content.index(b"NUMPY") + 130] ^= 1  # the first number: a length
        damage = bytes(content)
    chunk.write_bytes(damage)
    again = Counted(open_records(data))
    assert equal(index_lengths(again, maker, cache=tmp_path / "cache"), first)
    assert again.read == [4, 5, 6, 7]


def test_other_data_or_settings_have_a_cache_of_their_own(data, maker, tiny_processor, tmp_path):
    records, cache = open_records(data), tmp_path / "cache"

    def read_with(maker=maker, records=records, **options):
        counted = Counted(records)
        index_lengths(counted, maker, cache=cache, **options)
        return len(counted.read)

    assert read_with() == 11
    assert read_with() == 0
    assert read_with(scale_factor=4) == 11
    assert read_with(decode=True) == 11
    assert read_with(SampleMaker(tiny_processor, max_length=500)) == 11
    (tmp_path / "other").mkdir()
    assert read_with(records=open_records(data, tmp_path / "other")) == 11
    os.utime(data, ns=(1, 1))
    assert read_with(records=open_records(data)) == 11


def test_it_stops_when_too_much_is_rejected(data, maker, small_chunks):
    with pytest.raises(TooManyRejects, match="1 of 8"):
        index_lengths(open_records(data), maker, rejects=Rejects(None, max_share=0.01, min_seen=1))


def test_a_scale_factor_that_cannot_be_is_refused_before_the_work(data, maker):
    counted = Counted(open_records(data))
    with pytest.raises(ValueError, match="scale_factor=0"):
        index_lengths(counted, maker, scale_factor=0)
    assert counted.read == []


@pytest.mark.slow
def test_worker_processes_give_the_same_and_tell_on_standard_error(
    data, maker, small_chunks, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr("tokenpacker.progress.FIRST_LINE_SECONDS", 0)
    records = open_records(data)
    shared = index_lengths(records, maker, num_workers=2, cache=tmp_path / "cache", progress=True)
    assert equal(shared, index_lengths(records, maker))
    assert len(list((tmp_path / "cache").glob("*/chunk-*.npz"))) == 3
    told = capfd.readouterr()
    assert told.out == ""
    assert told.err.splitlines()[-1].startswith(f"reading data: {len(records)} of {len(records)} (")


class Killed(Counted):
    def __getitem__(self, number):
        os._exit(9)


@pytest.mark.slow
def test_a_killed_worker_is_said_in_one_line(data, maker):
    with pytest.raises(ValueError, match="was killed, perhaps because memory ran out; run again"):
        index_lengths(Killed(open_records(data)), maker, num_workers=1)
