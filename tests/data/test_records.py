from __future__ import annotations

import json
import pickle
import tracemalloc

import pytest

from tokenpacker.data.records import Record, RecordError, open_records

HALF = "\ud83d"  # of an emoji
TALK = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}]


def row(id="a", **changes):
    return {"id": id, "image": "cat.png", "conversations": TALK, **changes}


def write_json(folder, rows, name="data.json", **options):
    path = folder / name
    path.write_text(json.dumps(rows, **options), encoding="utf-8")
    return path


def write_lines(folder, *lines, name="data.jsonl"):
    path = folder / name
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def write_parquet(folder, rows, name="data.parquet", **options):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = folder / name
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def reason(records, index):
    with pytest.raises(RecordError) as caught:
        records[index]
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_row_gives_its_conversation_and_its_images_below_the_root(tmp_path):
    record = open_records(write_json(tmp_path, [row(7, image="coco/cat.png", extra=1)]))[0]
    assert record == Record(id="7", conversation=tuple(TALK), images=(str(tmp_path / "coco" / "cat.png"),))


@pytest.mark.parametrize(
    ("given", "images"), [({}, ()), ({"image": None}, ()), ({"image": "a"}, "a"), ({"images": ["b", "a", "b"]}, "bab")]
)
def test_a_row_has_one_image_or_several_or_none(tmp_path, given, images):
    entry = {"id": "x", "conversations": TALK, **given}
    record = open_records(write_json(tmp_path, [entry]))[0]
    assert record.images == tuple(str(tmp_path / name) for name in images)


def test_every_format_gives_the_same_records(tmp_path):
    rows = [row("é1"), row("2", image=["a.png", "b.png"]), row("3", image=None)]
    lists = [
        {**entry, "image": [entry["image"]] if isinstance(entry["image"], str) else entry["image"]} for entry in rows
    ]
    files = [
        write_json(tmp_path, rows),
        write_json(tmp_path, rows, "indented.json", indent=2, ensure_ascii=False),
        write_lines(tmp_path, rows[0], "  ", rows[1], "", rows[2]),
        write_parquet(tmp_path, lists, row_group_size=2),
    ]
    bom = tmp_path / "bom.json"
    bom.write_bytes(b"\xef\xbb\xbf" + files[1].read_bytes())
    expected = [Record(id="é1", conversation=tuple(TALK), images=(str(tmp_path / "cat.png"),))]
    for path in [*files, bom]:
        records = open_records(path)
        assert [records[0]] == expected, path
        assert [records[i].id for i in range(len(records))] == ["é1", "2", "3"], path
        assert [len(records[i].images) for i in range(3)] == [1, 2, 0], path


def test_several_files_follow_each_other(tmp_path):
    files = [write_json(tmp_path, [row("a"), row("b")]), write_lines(tmp_path, row("c"), "{")]
    records = open_records(files)
    assert [records[i].id for i in (2, 0, 1)] == ["c", "a", "b"]
    assert len(records) == 4
    assert records.files == tuple(files)
    assert reason(records, 3).source == f"{files[1]}, line 2"
    with pytest.raises(IndexError):
        records[4]


def test_records_travel_to_other_processes(tmp_path):
    files = [write_parquet(tmp_path, [row()]), write_json(tmp_path, [row()])]
    records = open_records(files)
    first = records[0]
    copy = pickle.loads(pickle.dumps(records))
    assert (copy[0], copy[1]) == (first, first)
    error = RecordError("a", "is bad", "too long", "file, line 1")
    assert vars(pickle.loads(pickle.dumps(error))) == vars(error)


def test_captions_of_coco_become_conversations(tmp_path):
    content = {
        "images": [{"id": 9, "file_name": "9.jpg"}],
        "annotations": [
            {"id": 1, "image_id": 9, "caption": " a cat\n"},
            {"id": 2, "image_id": 8, "caption": "a dog"},
            {"id": 3, "image_id": 9, "caption": None},
            "nonsense",
        ],
    }
    records = open_records(write_json(tmp_path, content), tmp_path)
    assert records[0].id == "1"
    assert records[0].images == (str(tmp_path / "9.jpg"),)
    assert [message["value"] for message in records[0].conversation] == ["<image>", "a cat"]
    assert "image_id=8 names no entry" in reason(records, 1).reason
    assert "caption=None" in reason(records, 2).reason
    assert reason(records, 3).kind == "malformed row"


def test_parquet_holds_images_as_bytes_or_as_the_struct_of_the_datasets_library(tmp_path):
    talk = {"conversations": TALK}
    as_bytes = open_records(write_parquet(tmp_path, [{"image": b"png", **talk}]))
    assert as_bytes[0].images == (b"png",)
    structs = [{"bytes": b"png", "path": "x"}, {"bytes": None, "path": "y.png"}]
    as_structs = open_records(write_parquet(tmp_path, [{"images": structs, **talk}]))
    assert as_structs[0].images == (b"png", str(tmp_path / "y.png"))
    assert as_structs[0].id.endswith("data.parquet, row 1")


def test_of_parquet_one_row_group_is_in_memory(tmp_path):
    rows = [{"id": str(i), "image": bytes([i]) * 1000, "conversations": TALK} for i in range(40)]
    records = open_records(write_parquet(tmp_path, rows, row_group_size=10))
    for index in (0, 39, 11, 25, 10, 9):
        assert records[index].images == (bytes([index]) * 1000,)
        assert records._files[0]._group[1].num_rows == 10


@pytest.mark.parametrize("name", ["big.json", "big.jsonl"])
def test_rows_stay_in_the_file(tmp_path, name):
    rows = [row(str(i), note="x" * 5000) for i in range(400)]
    path = write_json(tmp_path, rows, name) if name.endswith("json") else write_lines(tmp_path, *rows, name=name)
    tracemalloc.start()
    records = open_records(path)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert records[399].id == "399"
    assert held < path.stat().st_size / 20  # 24 bytes a row instead of 5 kB


@pytest.mark.parametrize(
    "image", ["../secret.png", "/etc/passwd", "a/../../secret.png", "//etc/passwd", "", "a\0b", "http://x.org/a.png"]
)
def test_a_path_out_of_the_folder_of_images_is_rejected(tmp_path, image):
    (tmp_path / "images").mkdir()
    records = open_records(write_json(tmp_path, [row(image=image)]), tmp_path / "images")
    error = reason(records, 0)
    assert (error.id, error.kind) == ("a", "unsafe path")


def test_a_path_within_the_folder_may_be_written_in_any_way(tmp_path):
    inside = str(tmp_path / "b" / "cat.png")
    records = open_records(write_json(tmp_path, [row(image=[inside, "a/../b/./cat.png", "b//cat.png"])]))
    assert records[0].images == (inside,) * 3


def test_no_dots_are_left_for_a_link_to_lead_astray(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "images" / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    records = open_records(write_json(tmp_path, [row(image="link/../x.png")]), tmp_path / "images")
    assert records[0].images == (str(tmp_path / "images" / "x.png"),)


@pytest.mark.parametrize(
    ("bad", "kind", "words"),
    [
        ([], "malformed row", "is a list"),
        (row(id=[1]), "malformed row", "id=[1]"),
        (row(id="a\nb", image=3), "malformed row", "an image is a int"),
        (row(image=3), "malformed row", "an image is a int"),
        (row(images="b.png"), "malformed row", "both 'image' and 'images'"),
        (row(conversations=None), "malformed conversation", "no 'conversations'"),
        (row(conversations=[]), "malformed conversation", "at least one message"),
        (row(conversations="hello"), "malformed conversation", "must be a list"),
        (row(conversations=[{"from": "system", "value": ""}]), "malformed conversation", "message 1 is from 'system'"),
        (
            row(conversations=[*TALK, {"from": "human", "value": 5}]),
            "malformed conversation",
            "message 3 is given as int",
        ),
        (
            row(conversations=[*TALK, {"from": "human", "value": HALF}]),
            "malformed conversation",
            "message 3 has U+D83D",
        ),
        (row(id=HALF, conversations=None), "malformed conversation", "no 'conversations'"),
        (row(image=HALF), "unsafe path", r"'\ud83d' names no file"),
        (row(image="a.png", regions=[[{"mask": HALF}]]), "unsafe path", "mask path"),
        (row(image="a\0.png"), "unsafe path", "names no file"),
        ('{"id" "a"}', "malformed row", "column 7"),
        ('{"id": "a"', "malformed row", "column 11"),
        ("[" * 100_000, "malformed row", "no usable JSON"),
    ],
)
def test_a_bad_row_is_one_error_and_its_neighbours_are_fine(tmp_path, bad, kind, words):
    path = write_lines(tmp_path, row("before"), bad, row("after"))
    records = open_records(path)
    assert [records[0].id, records[2].id] == ["before", "after"]
    error = reason(records, 1)
    assert error.kind == kind
    assert words in error.reason
    assert error.source == f"{path}, line 2"
    assert f"{error.id} {error}".encode()


def test_an_id_with_half_a_character_can_be_printed(tmp_path):
    record = open_records(write_lines(tmp_path, row(id="a" + HALF)))[0]
    assert record.id == r"a\ud83d"


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_json_file_of_lines_and_a_file_of_lines_that_is_a_list_are_read_as_what_they_are(tmp_path, mark):
    rows = [row("a"), row("b"), row("c")]
    lines = write_lines(tmp_path, *rows, name="lines.json")
    one = write_lines(tmp_path, row("a"), name="one.json")
    array = write_json(tmp_path, rows, name="list.jsonl", indent=1)
    for path, ids in ((lines, "abc"), (array, "abc"), (one, "a")):
        path.write_text(mark + path.read_text(), encoding="utf-8")
        assert "".join(record.id for record in open_records(path)) == ids
    assert open_records(lines).where(1) == f"{lines}, line 2"
    assert open_records(array).where(1).startswith(f"{array}, entry 2 in line ")


def test_a_text_of_parquet_that_is_no_utf_8_is_one_bad_row(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    talks = pa.array([TALK, TALK])
    ids = pa.array([b"a", b"\xff"], type=pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"id": ids, "conversations": talks}), tmp_path / "data.parquet")
    records = open_records(tmp_path / "data.parquet")
    assert records[0].id == "a"
    assert "a text is no UTF-8 at byte 1" in reason(records, 1).reason


def test_bytes_that_are_no_text_are_one_bad_row(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(row()).encode() + b'\n{"id": "\xff"}\n')
    records = open_records(path)
    assert records[0].id == "a"
    assert "no UTF-8 at byte 9" in reason(records, 1).reason


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[\n {"id": 1},\n {"id" 2}]', "line 3, column 8: Expecting ':' delimiter"),
        ('[\n {"id": 1}\n {"id": 2}]', "line 3, column 2: ',' or ']' is missing"),
        ('[{"id": 1},\n]', "line 2, column 1: a comma before the end"),
        ('[{"id": 1}', "line 1, column 11: ',' or ']' is missing"),
        ("7", "line 1, column 1: a list of rows begins with '['"),
        ("[{}]\n[{}]", "line 2, column 1: Extra data; repair it there"),
        ('{"id": 1} {"id": 2}', "line 1, column 11: Extra data; repair it there"),
        ('{"id": 1}', "an object without the lists 'images' and 'annotations'"),
        ("", "line 1, column 1"),
        ("[]", "holds no rows"),
        ("[" * 100_000, "nests too many brackets"),
    ],
)
def test_a_json_file_that_is_malformed_as_a_whole_is_refused_with_its_place(tmp_path, text, words):
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"data\.json") as caught:
        open_records(path)
    assert words in str(caught.value)


def test_what_cannot_be_opened_says_what_to_do(tmp_path):
    good = write_json(tmp_path, [row()])
    with pytest.raises(ValueError, match=r"nothing\.json does not exist"):
        open_records(tmp_path / "nothing.json")
    with pytest.raises(ValueError, match=r"ends in none of \.json, \.jsonl"):
        open_records(good.rename(tmp_path / "data.txt"))
    with pytest.raises(ValueError, match="format='yaml' is unknown"):
        open_records(tmp_path / "data.txt", format="yaml")
    with pytest.raises(ValueError, match=r"images_root=.*nowhere is no folder"):
        open_records(tmp_path / "data.txt", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no Parquet files"):
        open_records(tmp_path)
    assert open_records(tmp_path / "data.txt", format="json")[0].id == "a"


def test_a_parquet_file_that_is_none_or_lacks_its_column_is_refused(tmp_path):
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match="no readable Parquet file"):
        open_records(bad)
    with pytest.raises(ValueError, match="has no column 'conversations' but id, text"):
        open_records(write_parquet(tmp_path, [{"id": 1, "text": "x"}]))
