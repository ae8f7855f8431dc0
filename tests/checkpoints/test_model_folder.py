"""A converted folder appears whole or not at all, and nothing that was there is lost."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys

import pytest
import torch

from tokenpacker.checkpoints import convert, export_original, load_released
from tokenpacker.checkpoints import model_folder as folder


def test_a_folder_that_is_taken_stays_as_it_is(make_complete, tmp_path):
    target = tmp_path / "converted"
    target.mkdir()
    (target / "precious").write_text("keep")
    with pytest.raises(ValueError, match="exists already; choose another folder, or pass --overwrite"):
        convert(make_complete(), target)
    with pytest.raises(ValueError, match="is no model's folder and is not replaced"):
        convert(make_complete(), target, overwrite=True)
    assert (target / "precious").read_text() == "keep"
    (target / "config.json").write_text("{}")
    convert(make_complete(), target, overwrite=True)
    assert not (target / "precious").exists()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_too_little_room_is_told_before_anything_is_written(make_complete, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"has room for 0 MB but 69 MB are needed; free some"):
        convert(make_complete(), tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_ctrl_c_while_writing_leaves_nothing(make_complete, tmp_path, monkeypatch, failure):
    calls = []

    def fail_at_the_second_shard(tensors, path, **_):
        calls.append(path)
        path.write_bytes(b"half")
        if len(calls) == 2:
            raise failure

    src = make_complete()
    monkeypatch.setattr(folder, "save_file", fail_at_the_second_shard)
    with pytest.raises(type(failure)):
        convert(src, tmp_path / "converted", shard_bytes=100_000)
    assert len(calls) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [src.name]
    monkeypatch.undo()
    convert(src, tmp_path / "converted", shard_bytes=100_000)


@pytest.mark.skipif(not shutil.which("mount") or os.geteuid() != 0, reason="a small disk needs root to be mounted")
def test_a_disk_that_is_really_full(make_complete, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=False, capture_output=True
    ).returncode:
        pytest.skip("this machine does not allow mounts")
    try:
        src = make_complete()
        convert(src, tmp_path / "converted")
        monkeypatch.setattr(folder, "SPARE_BYTES", -(10**9))  # past the check beforehand
        with pytest.raises(OSError, match="the disk is full; nothing was kept"):
            convert(src, disk / "model")
        for weights in ("bin", "safetensors"):
            with pytest.raises(OSError, match="the disk is full; nothing was kept"):
                export_original(tmp_path / "converted", disk / "model", weights=weights)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_what_a_killed_conversion_left_is_cleared_by_the_next(make_complete, tmp_path):
    src = make_complete()
    code = (
        "import os; from tokenpacker import checkpoints; from tokenpacker.checkpoints import model_folder as folder\n"
        "save = folder.save_file\n"
        "def die(tensors, path, **kwargs):\n"
        "    save(tensors, path, **kwargs); os.kill(os.getpid(), 9)\n"
        "folder.save_file = die\n"
        f"checkpoints.convert({str(src)!r}, {str(tmp_path / 'converted')!r}, shard_bytes=100_000)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert not (tmp_path / "converted").exists()
    assert (tmp_path / ".converted.partial").exists()
    convert(src, tmp_path / "converted")
    assert not (tmp_path / ".converted.partial").exists()


def test_what_is_read_is_never_overwritten(make_complete, tmp_path):
    src = make_complete()
    for target in (src, tmp_path):
        with pytest.raises(ValueError, match="which is read; choose another folder to write"):
            convert(src, target, overwrite=True)
    load_released(src)


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "model"

    def write_while_it_appears():
        with folder.new_folder(target, 0) as partial:
            (partial / "config.json").write_text("{}")
            target.mkdir()
            (target / "precious").write_text("keep")

    with pytest.raises(OSError, match="not empty"):
        write_while_it_appears()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (target / "precious").read_text() == "keep"


def test_two_writers_of_one_folder_do_not_mix(tmp_path):
    with folder.new_folder(tmp_path / "model", 0) as first:
        (first / "weights").write_text("first")
        with (
            pytest.raises(ValueError, match="another process is writing"),
            folder.new_folder(tmp_path / "model", 0),
        ):
            pass
    assert (tmp_path / "model" / "weights").read_text() == "first"


def test_a_link_is_followed_and_parents_that_were_made_go_with_a_failure(make_complete, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    convert(make_complete(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "config.json").is_file()
    bad = make_complete(
        change=lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"] * torch.nan})
    )
    with pytest.raises(ValueError, match="NaN"):
        convert(bad, tmp_path / "new" / "deep" / "model")
    assert not (tmp_path / "new").exists()


def test_a_terminated_conversion_leaves_nothing(make_complete, tmp_path):
    src = make_complete()
    code = (
        "import os, signal\n"
        "from tokenpacker.cli import main\n"
        "from tokenpacker.checkpoints import model_folder as folder\n"
        "folder.save_file = lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"import sys; sys.argv = ['tokenpacker', 'convert', {str(src)!r}, {str(tmp_path / 'model')!r}]\n"
        "main()\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 143
    assert [path.name for path in tmp_path.iterdir()] == [src.name]
