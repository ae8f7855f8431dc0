"""`tokenpacker data get`: from a hub on this machine, with damage, interruptions and no network."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest
from PIL import Image as Picture

from fake_hub import OLDER, REVISION, FakeHub, endpoint

SHARDS = [f"data/test-0000{number}-of-00002.parquet" for number in range(2)]


@pytest.fixture(scope="session")
def shards() -> list[bytes]:
    """POPE in two Parquet files."""
    datasets = pytest.importorskip("datasets")
    file = io.BytesIO()
    Picture.new("RGB", (8, 6), "red").save(file, "PNG")
    contents = []
    for number in range(2):
        row = {
            "question_id": str(number),
            "question": "Is there a cat?",
            "answer": "yes",
            "category": "random",
            "image": {"bytes": file.getvalue(), "path": None},
        }
        parquet = io.BytesIO()
        datasets.Dataset.from_list([row]).cast_column("image", datasets.Image()).to_parquet(parquet)
        contents.append(parquet.getvalue())
    return contents


@pytest.fixture
def hub(shards, monkeypatch):
    files = {
        "README.md": b"# POPE\n",
        "Full/random-00000-of-00001.parquet": b"PAR1",
        **dict(zip(SHARDS, shards, strict=True)),
    }
    with (
        FakeHub("lmms-lab-encoder/POPE", files, tuple(SHARDS)).serve() as served,
        endpoint(monkeypatch, served.address),
    ):
        yield served


def get(*more):
    return "data", "get", "pope", *more


def test_files_are_fetched_verified_and_read(run, hub, tmp_path, monkeypatch):
    hub.card = {"license": "mit"}
    result = run(*get("--to", tmp_path))
    assert result.exit_code == 0, result.output
    first, second = result.stderr.splitlines()[:2]
    assert first.startswith(f"lmms-lab-encoder/POPE at revision {REVISION}: 3 files, ")
    assert second == "licence: mit"
    assert result.stdout.splitlines() == [
        f"{tmp_path / 'POPE'}: all checksums are the hub's",
        f"next: tokenpacker evaluate --tasks pope --data {tmp_path}",
    ]
    assert (tmp_path / "POPE" / "README.md").read_bytes() == b"# POPE\n"
    assert not (tmp_path / "POPE" / "Full").exists()
    from tokenpacker.evaluate.layouts.hub_tables import load_table

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    loaded = load_table("pope", tmp_path)
    assert len(loaded.questions) == 2
    assert loaded.source == f"{tmp_path / 'POPE'} (lmms-lab-encoder/POPE@{REVISION})"


def test_a_second_call_fetches_nothing(run_json, hub, tmp_path):
    first = run_json(*get("--to", tmp_path))
    fetched = dict(hub.requests)
    assert run_json(*get("--to", tmp_path)) == first
    assert dict(hub.requests) == fetched
    assert first["files"][SHARDS[0]] == hub.checksum(SHARDS[0])
    assert first["license"] is None


def test_an_unknown_licence_is_said(run, hub, tmp_path):
    assert "licence: not stated on its page; ask its authors" in run(*get("--to", tmp_path)).stderr


def test_a_licence_of_its_own_is_named(run_json, hub, tmp_path):
    hub.card = {"license": "other", "license_name": "coco", "license_link": "https://cocodataset.org"}
    assert run_json(*get("--to", tmp_path))["license"] == "other, coco, https://cocodataset.org"


def test_damage_on_the_way_is_fetched_again(run, hub, tmp_path):
    hub.damaged[SHARDS[1]] = 1
    assert run(*get("--to", tmp_path)).exit_code == 0
    assert hub.requests[SHARDS[1]] == 2
    assert (tmp_path / "POPE" / SHARDS[1]).read_bytes() == hub.files[SHARDS[1]]


def test_damage_on_the_disk_is_found_and_mended(run, hub, tmp_path):
    run(*get("--to", tmp_path))
    path = tmp_path / "POPE" / SHARDS[0]
    times = path.stat()
    path.write_bytes(bytes(len(hub.files[SHARDS[0]])))  # of the same size
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert run(*get("--to", tmp_path)).exit_code == 0
    assert path.read_bytes() == hub.files[SHARDS[0]]
    assert hub.requests[SHARDS[1]] == 1


def test_damage_that_stays_is_an_error(run, hub, tmp_path):
    hub.damaged[SHARDS[1]] = 9
    result = run(*get("--to", tmp_path))
    assert result.exit_code == 2
    assert f"{SHARDS[1]} of lmms-lab-encoder/POPE differs from the hub's checksum each time" in result.stderr
    assert not (tmp_path / "POPE" / SHARDS[1]).exists()
    assert (tmp_path / "POPE" / SHARDS[0]).exists()


def test_a_killed_call_goes_on_where_it_was(run, hub, tmp_path):
    hub.stuck.add(SHARDS[1])
    command = [sys.executable, "-m", "tokenpacker", *map(str, get("--to", tmp_path))]
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        assert hub.reached.wait(60)
        process.kill()
    hub.stuck.clear()
    assert not (tmp_path / "POPE" / SHARDS[1]).exists()
    assert json.loads((tmp_path / "POPE" / "source.json").read_text())["revision"] == REVISION
    assert run(*get("--to", tmp_path)).exit_code == 0
    assert hub.requests[SHARDS[0]] == 1
    assert list((tmp_path / "POPE").rglob("*.incomplete")) == []


def test_a_folder_stays_with_its_revision(run_json, one_line_error, hub, tmp_path):
    run_json(*get("--to", tmp_path))
    hub.revision = OLDER  # main moves on
    assert run_json(*get("--to", tmp_path))["revision"] == REVISION
    message = one_line_error(*get("--to", tmp_path, "--revision", "main"))
    assert f"POPE holds lmms-lab-encoder/POPE at revision {REVISION}, and {OLDER} is asked for" in message


def test_another_split_joins_the_record(run_json, hub, tmp_path):
    run_json(*get("--to", tmp_path))
    run_json(*get("--to", tmp_path, "--split", "random"))
    record = json.loads((tmp_path / "POPE" / "source.json").read_text())
    assert {file["path"] for file in record["files"]} == set(hub.files)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--revision", "nope"), "cannot be fetched (it has no such revision); check it"),
        (("--split", "popular"), "lmms-lab-encoder/POPE has no Full/popular-*.parquet at revision aaaa"),
        (("--split", "train"), "pope has no split 'train'; use one of: test, adversarial"),
    ],
)
def test_what_the_hub_lacks_is_told_in_one_line(one_line_error, hub, tmp_path, options, message):
    assert message in one_line_error(*get("--to", tmp_path, *options))
    assert not (tmp_path / "POPE").exists()


def test_consent_that_is_missing_is_told(run, hub, tmp_path):
    hub.gated = True
    result = run(*get("--to", tmp_path))
    assert result.exit_code == 2
    assert "(its owners ask for consent first); agree on its page, then run: hf auth login" in result.stderr


def test_a_data_set_that_is_not_there_is_told(one_line_error, hub, tmp_path):
    assert "(the hub has no such data set, or it is private)" in one_line_error("data", "get", "gqa", "--to", tmp_path)


def test_a_full_disk_is_told_before_anything_is_fetched(run, hub, tmp_path, monkeypatch):
    monkeypatch.setattr("tokenpacker.data.hub_files.SPARE_BYTES", 10**18)
    result = run(*get("--to", tmp_path))
    assert "has room for " in result.stderr
    assert not hub.requests


def test_without_a_network_it_says_how_to_do_it_by_hand(one_line_error, tmp_path, monkeypatch):
    with endpoint(monkeypatch, "http://127.0.0.1:9"):
        message = one_line_error(*get("--to", tmp_path))
    assert "refused" in message
    assert f"put them into {tmp_path / 'POPE'}" in message
    assert "download data/test-*.parquet from http://127.0.0.1:9/datasets/lmms-lab-encoder/POPE on any" in message


def test_the_list_names_all_data_sets(run, run_json):
    lines = run("data", "get", "--list").stdout.splitlines()
    assert lines[0].split() == ["pope", "lmms-lab-encoder/POPE", "test,", "adversarial,", "popular,", "random"]
    assert [line.split()[0] for line in lines] == list(run_json("data", "get", "--list"))
    assert all(len(line) <= 80 for line in lines)


def test_a_wrong_name_is_told_before_the_hub_is_asked(one_line_error):
    assert one_line_error("data", "get", "poppe").endswith("; did you mean pope?")
    assert one_line_error("data", "get") == "NAME is missing; `tokenpacker data get --list` lists the data sets"
    assert "has no splits; leave it out" in one_line_error("data", "get", "llava-pretrain", "--split", "test")
