from __future__ import annotations

import json
import shutil

import pytest
from torch.utils.data import DataLoader, Dataset

from tar_shards import write_tar
from tokenpacker.data.rows import Record, RecordError
from tokenpacker.data.streams import open_dataset, open_hub_dataset, open_shards

TALK = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}]


@pytest.fixture(autouse=True)
def _libraries():
    pytest.importorskip("webdataset")
    pytest.importorskip("datasets")


def talk(**row):
    return json.dumps({"conversations": TALK, **row}).encode()


@pytest.fixture
def shards(tmp_path):
    """Four shards of three samples."""
    for shard in range(4):
        files = {}
        for sample in range(3):
            files |= {f"s{shard}{sample}.json": talk(), f"s{shard}{sample}.jpg": b"picture"}
        write_tar(tmp_path / f"{shard}.tar", files)
    return tmp_path


@pytest.fixture
def table():
    """A `datasets` stream of four shards of three rows."""
    from datasets import Dataset

    rows = {"id": [f"s{i // 3}{i % 3}" for i in range(12)], "conversations": [TALK] * 12, "image": ["cat.png"] * 12}
    return Dataset.from_dict(rows).to_iterable_dataset(num_shards=4)


@pytest.fixture(params=["tar", "datasets"])
def open_stream(request, shards, table):
    """Opens the same twelve samples: `open_stream(seed=0)`."""
    return (
        (lambda **options: open_shards(shards, **options))
        if request.param == "tar"
        else (lambda **options: open_dataset(table, **options))
    )


def ids(stream, position=None):
    return [record.id for _, record in stream.stream(position)]


def one(path):
    [(_, record)] = open_shards(path).stream()
    return record


def test_a_stream_gives_every_sample_once(open_stream):
    assert sorted(ids(open_stream())) == [f"s{shard}{sample}" for shard in range(4) for sample in range(3)]


def test_it_goes_on_after_any_position_as_if_never_stopped(open_stream):
    whole = list(open_stream(seed=3).stream())
    for number, (position, _) in enumerate(whole):
        kept = json.loads(json.dumps(position))
        assert list(open_stream(seed=3).stream(kept)) == whole[number + 1 :]


def test_seed_and_epoch_decide_the_order_of_shards_and_nothing_else(open_stream):
    stream = open_stream(seed=0)
    orders = [ids(stream, stream.start(epoch)) for epoch in range(4)]
    assert orders[0] == ids(open_stream(seed=0))
    assert len({tuple(order) for order in orders}) > 1
    assert len({tuple(ids(open_stream(seed=seed))) for seed in range(4)}) > 1
    for order in orders:
        assert [order[start : start + 3] for start in range(0, 12, 3)] == [
            [f"{order[start][:2]}{sample}" for sample in range(3)] for start in range(0, 12, 3)
        ]
    assert ids(open_stream(seed=None)) == sorted(orders[0])


@pytest.mark.parametrize(
    "change", [{"stream": "other"}, {"shard": 4}, {"shard": -1}, {"sample": "2"}, {"epoch": None}], ids=str
)
def test_a_position_of_something_else_is_refused(open_stream, change):
    stream = open_stream()
    with pytest.raises(ValueError, match="position="):
        next(stream.stream({**stream.start(), **change}))
    with pytest.raises(ValueError, match="another seed"):
        next(stream.stream(open_stream(seed=7).start()))


class WholeStream(Dataset):
    """Every item is the ids of a whole epoch."""

    def __init__(self, stream):
        self.stream = stream

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return ids(self.stream)


def test_each_worker_process_reads_the_whole_stream(open_stream):
    stream = open_stream()
    assert list(DataLoader(WholeStream(stream), num_workers=2, batch_size=None)) == [ids(stream)] * 2


def test_a_position_holds_where_the_shards_are_moved_and_not_where_they_change(shards, tmp_path_factory):
    moved = shutil.copytree(shards, tmp_path_factory.mktemp("elsewhere") / "shards")
    found = list(open_shards(shards).stream())
    position = found[4][0]
    assert ids(open_shards(moved), position) == [record.id for _, record in found[5:]]
    write_tar(moved / "2.tar", {f"{number}.json": talk() for number in range(30)})
    with pytest.raises(ValueError, match="belongs to other shards"):
        ids(open_shards(moved), position)


def test_images_of_a_sample_come_in_the_order_of_their_numbers(tmp_path):
    numbered = {f"a.{number}.png": b"%d" % number for number in (10, 2, 0)}
    record = one(write_tar(tmp_path / "x.tar", {"a.json": talk(id=5, image="ignored.jpg"), **numbered}))
    assert record == Record(id="5", conversation=tuple(TALK), images=(b"0", b"2", b"10"))


def test_a_text_beside_an_image_is_its_caption(tmp_path):
    record = one(write_tar(tmp_path / "x.tar", {"a.jpg": b"x", "a.txt": b"a cat\n", "a.json": b'{"width": 3}'}))
    assert [message["value"] for message in record.conversation] == ["<image>", "a cat"]
    assert record.images == (b"x",)


def test_a_bad_sample_is_one_error_and_counts_in_the_position(tmp_path):
    files = {"a.json": talk(), "b.json": b"{", "c.jpg": b"x", "d.json": talk(), "d.JPG": b"x"}
    stream = open_shards(write_tar(tmp_path / "x.tar.gz", files, "w:gz"))
    found = list(stream.stream())
    assert [type(record) for _, record in found] == [Record, RecordError, RecordError, Record]
    assert "column 2" in found[1][1].reason
    assert found[2][1].kind == "malformed conversation"
    assert [record.id for _, record in stream.stream(found[1][0])] == ["c", "d"]


def test_two_files_of_one_name_spoil_their_sample_only(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, {"a.json": talk(), "b.json": talk()})
    write_tar(path, {"b.json": talk(), "c.json": talk()}, "a")
    a, b, c = (record for _, record in open_shards(path).stream())
    assert (a.id, b.id, c.id) == ("a", "b", "c")
    assert "duplicate" in b.reason


def test_a_truncated_shard_is_one_error_and_the_next_shard_follows(shards):
    path = shards / "1.tar"
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"s12.jpg") + 600])
    stream = open_shards(shards, seed=None)
    found = list(stream.stream())
    names = [record.id for _, record in found if isinstance(record, Record)]
    assert names == ["s00", "s01", "s02", "s10", "s11", *[f"s{shard}{i}" for shard in (2, 3) for i in range(3)]]
    number, error = next((n, record) for n, (_, record) in enumerate(found) if isinstance(record, RecordError))
    assert error.kind == "damaged shard"
    assert error.id.endswith("1.tar, after sample 2")
    for before in (number - 1, number):
        assert [str(record) for _, record in stream.stream(found[before][0])] == [
            str(record) for _, record in found[before + 1 :]
        ]


def test_a_file_that_is_no_tar_is_one_error(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"hello")
    assert one(tmp_path / "x.tar").kind == "damaged shard"


def test_what_is_not_there_is_said_at_once(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        open_shards(tmp_path / "no.tar")
    with pytest.raises(ValueError, match="holds no tar files"):
        open_shards(tmp_path)
    with pytest.raises(ValueError, match="at least one shard"):
        open_shards([])


def test_images_of_the_datasets_library_are_not_decoded(tmp_path, image_of):
    from datasets import Dataset, Features, Image, List, Value

    image_of(4, 4).save(tmp_path / "a.png")
    message = {"from": Value("string"), "value": Value("string")}
    features = Features({"conversations": List(message), "images": List(Image())})
    picture = str(tmp_path / "a.png")
    dataset = Dataset.from_dict({"conversations": [TALK], "images": [[picture, picture]]}, features=features)
    [(_, record)] = open_dataset(dataset.to_iterable_dataset(), tmp_path).stream()
    assert record.images == (picture, picture)
    assert record.id == "dataset, shard 1 of 1, row 1"


def test_bad_rows_of_the_datasets_library_are_errors(table):
    found = [record for _, record in open_dataset(table.map(lambda row: {"image": "../x"})).stream()]
    assert {record.kind for record in found} == {"unsafe path"}
    assert len(found) == 12


@pytest.fixture
def hub_folder(tmp_path, table):
    """A data set as the datasets library finds it in a folder: two splits, `train` of two files."""
    from datasets import Dataset

    rows = Dataset.from_list(list(table))
    rows.select(range(5)).to_parquet(tmp_path / "train-0.parquet")
    rows.select(range(5, 10)).to_parquet(tmp_path / "train-1.parquet")
    rows.select(range(10, 12)).to_parquet(tmp_path / "test-0.parquet")
    return tmp_path


def test_a_data_set_of_the_hub_is_opened_by_name_split_and_configuration(hub_folder):
    everything = [f"s{shard}{sample}" for shard in range(4) for sample in range(3)]
    assert ids(open_hub_dataset(str(hub_folder), seed=None)) == everything[:10]
    assert ids(open_hub_dataset(f"{hub_folder}:test")) == everything[10:]
    assert ids(open_hub_dataset(f"{hub_folder}:default/test")) == everything[10:]


def test_image_paths_of_a_data_set_of_the_hub_are_below_the_folder_of_images(hub_folder):
    record = next(record for _, record in open_hub_dataset(str(hub_folder), "/pictures").stream())
    assert record.images == ("/pictures/cat.png",)


@pytest.mark.parametrize(
    ("suffix", "reason"), [(":no", r"Bad split: no\. Available"), (":no/train", "'no' not found"), ("/no", "no")]
)
def test_what_the_datasets_library_does_not_find_is_said_in_one_line(hub_folder, suffix, reason, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("tokenpacker.data.streams.hub_problem", lambda: None)
    with pytest.raises(ValueError, match=rf"{suffix} cannot be opened \(.*{reason}.*\); check the name") as raised:
        open_hub_dataset(f"{hub_folder}{suffix}")
    assert "\n" not in str(raised.value)


def test_a_data_set_that_cannot_be_reached_is_said_in_one_line(monkeypatch):
    import datasets

    def fail(*_, **__):
        raise ConnectionError("Couldn't reach\nthe hub.")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match=r"data set a/b cannot be opened \(HF_HUB_OFFLINE is set\); check the name"):
        open_hub_dataset("a/b")
    monkeypatch.setattr("tokenpacker.data.streams.hub_problem", lambda: None)
    with pytest.raises(
        ValueError, match=r"data set a/b cannot be opened \(Couldn't reach the hub\); .*and the network"
    ):
        open_hub_dataset("a/b")


def test_a_damaged_file_of_the_datasets_library_is_one_error_and_the_next_follows(hub_folder):
    whole = (hub_folder / "train-0.parquet").read_bytes()
    (hub_folder / "train-0.parquet").write_bytes(whole[:40] + b"\xff" * 60 + whole[100:])
    found = list(open_hub_dataset(str(hub_folder), seed=None).stream())
    assert found[0][1].kind == "damaged shard"
    assert len(found) == 6
    assert ids(open_hub_dataset(str(hub_folder), seed=None), found[0][0]) == ["s12", "s20", "s21", "s22", "s30"]


def test_a_network_that_fails_while_reading_is_not_taken_for_damaged_data():
    from datasets import IterableDataset

    def rows():
        yield {"id": "a", "conversations": TALK, "image": "cat.png"}
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        ids(open_dataset(IterableDataset.from_generator(rows)))
