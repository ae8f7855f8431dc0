"""Broken and hostile checkpoints: a clear error, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch

from released_layout import TOWER
from tokenpacker.hf.checkpoints import convert, export_original, folder, load_released

PROJECTOR = "model.mm_projector."


@pytest.fixture
def refused(tmp_path):
    """Tries to convert and to load; gives the message, and sees that nothing was left behind."""

    def convert_and_load(src, **options) -> str:
        before = sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises(ValueError, match=r"\w") as error:
            convert(src, tmp_path / "converted", **options)
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        with pytest.raises(ValueError, match=r"\w") as same:
            load_released(src, **options)
        assert str(same.value) == str(error.value)
        assert "\n" not in str(error.value)
        return str(error.value)

    return convert_and_load


def test_unknown_missing_and_misshaped_tensors_are_all_listed_by_name(make_complete, refused):
    def spoil(tensors):
        tensors["model.mm_projector.novelty.weight"] = torch.zeros(2)
        tensors["something.else"] = torch.zeros(2)
        del tensors[f"{PROJECTOR}ln_q_1.bias"]
        tensors[f"{PROJECTOR}clip_attn.in_proj_weight"] = torch.zeros(64, 64)

    message = refused(make_complete(change=spoil))
    assert "2 unknown: model.mm_projector.novelty.weight, something.else" in message
    assert f"1 missing: {PROJECTOR}ln_q_1.bias" in message
    assert f"1 wrong shape: {PROJECTOR}clip_attn.in_proj_weight is 64x64, should be 192x64" in message


def test_a_tower_that_is_inside_in_part_is_refused(make_complete, refused):
    name = f"{TOWER}vision_model.encoder.layers.7.mlp.fc1.bias"
    assert f"1 missing: {name}" in refused(make_complete(change=lambda tensors: tensors.pop(name)))


def test_a_region_model_is_told_as_such(make_complete, refused):
    def add_region_module(tensors):
        tensors["mask_extractor.feat_linear.weight"] = torch.zeros(2, 2)

    assert "mask_extractor belongs to a region model" in refused(make_complete(change=add_region_module))


@pytest.mark.parametrize("weights", ["bin", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_file_that_was_cut_off(make_complete, refused, weights, share):
    src = make_complete(weights)
    file = next(path for path in src.iterdir() if path.suffix in (".bin", ".safetensors"))
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    assert refused(src).startswith(f"{file} cannot be read; it is damaged or cut off")


@pytest.mark.parametrize("weights", ["bin", "safetensors"])
def test_a_shard_that_is_not_there(make_complete, refused, weights):
    src = make_complete(weights, shards=3)
    file = next(src.glob("*-00002-of-00003.*"))
    file.unlink()
    assert f"names the shard {file.name}, which is missing" in refused(src)


def test_an_index_that_misses_an_entry(make_complete, refused):
    src = make_complete(shards=2)
    index = src / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(content))
    assert "has no entry for lm_head.weight, which the shards hold" in refused(src)
    content["weight_map"]["lm_head.weight"] = content["weight_map"]["lm_head.bias"] = "pytorch_model-00001-of-00002.bin"
    index.write_text(json.dumps(content))
    assert "places lm_head.bias in pytorch_model-00001-of-00002.bin, which does not hold it" in refused(src)


def test_shards_without_an_index(make_complete, refused):
    src = make_complete(shards=2)
    (src / "pytorch_model.bin.index.json").unlink()
    assert "has shards such as pytorch_model-00001-of-00002.bin but no index" in refused(src)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_none(make_complete, refused, content):
    src = make_complete(shards=2)
    (src / "pytorch_model.bin.index.json").write_text(content)
    assert "pytorch_model.bin.index.json is damaged" in refused(src)


def test_an_index_that_leads_out_of_the_folder(make_complete, refused):
    src = make_complete(shards=2)
    (src / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "../../elsewhere.bin"}}')
    assert "'../../elsewhere.bin', which is no weight file beside it" in refused(src)


@pytest.mark.parametrize("weights", ["bin", "safetensors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(make_complete, refused, weights, value):
    def spoil(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].clone()
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value

    assert "model.layers.1.mlp.up_proj.weight holds NaN or infinity" in refused(make_complete(weights, change=spoil))


class Hostile:
    def __reduce__(self):
        return os.system, ("touch /tmp/tokenpacker-was-here",)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(make_complete, refused, tmp_path, write):
    src = make_complete()
    write({"model.norm.weight": Hostile()}, src / "pytorch_model.bin")
    message = refused(src)
    assert message.startswith(f"{src / 'pytorch_model.bin'} is refused: beside tensors it wants to call posix.system")
    assert not os.path.exists("/tmp/tokenpacker-was-here")


@pytest.mark.parametrize(
    "content", [b"PK", b"PK\x03\x04", b"\x80\x04.", pickle.dumps(Hostile(), protocol=4), b"GIF89a"]
)
def test_a_file_of_another_kind(make_complete, refused, content):
    src = make_complete()
    (src / "pytorch_model.bin").write_bytes(content)
    assert "pytorch_model.bin cannot be read; it is damaged or cut off" in refused(src)
    assert not os.path.exists("/tmp/tokenpacker-was-here")


@pytest.mark.parametrize("value", [{"epoch": 3}, [torch.zeros(1)], {"model": {"a": torch.zeros(1)}}])
def test_a_file_with_other_things_than_tensors(make_complete, refused, value):
    src = make_complete()
    torch.save(value, src / "pytorch_model.bin")
    assert "pytorch_model.bin holds" in refused(src)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.model", "pytorch_model.bin"])
def test_a_folder_that_lacks_a_file(make_complete, refused, file):
    src = make_complete()
    (src / file).unlink()
    assert str(src) in refused(src)


@pytest.mark.parametrize("content", ["{", "[1]", '"text"', "\xff\xfe"])
def test_a_config_that_is_no_json_object(make_complete, refused, content):
    src = make_complete()
    (src / "config.json").write_text(content, encoding="latin-1")
    assert f"{src / 'config.json'} is damaged" in refused(src)


def test_sources_that_are_not_there(refused, tmp_path):
    assert refused("./nowhere").startswith("model ./nowhere does not exist; give a folder or hub id")
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(tmp_path / "file")


def test_a_base_is_asked_for_and_must_be_a_llama(make_stage_1, base_folder, make_complete, refused, tower_folder):
    src = make_stage_1()
    assert "holds only a projector; give the language model that it was trained from with --base" in refused(src)
    assert "is of the kind 'clip_vision_model'; a plain LLaMA" in refused(src, base=tower_folder)
    assert "needs no base" in refused(make_complete(), base=base_folder)


def test_a_tower_that_is_nowhere(make_complete, refused):
    src = make_complete(tower=False, config={"mm_vision_tower": "./nowhere"})
    assert refused(src).startswith(
        "model ./nowhere does not exist; give the tower's folder or hub id with --vision-tower"
    )
    src = make_complete(tower=False, config={"mm_vision_tower": None})
    assert refused(src).startswith("the checkpoint neither holds a vision tower nor names one")
    assert "the tower must be a CLIP" in refused(make_complete(), vision_tower=src)


def test_an_adapter_that_fits_no_weight(lora_folder, base_folder, refused):
    adapter = torch.load(lora_folder / "adapter_model.bin", weights_only=True)
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    torch.save(adapter | {name: torch.zeros(4, 7)}, lora_folder / "adapter_model.bin")
    assert "has shape (48, 7), the base model's weight (48, 32)" in refused(lora_folder, base=base_folder)
    torch.save({n: t for n, t in adapter.items() if n != name}, lora_folder / "adapter_model.bin")
    assert "lacks lora_A or lora_B of model.language_model.layers.0.mlp.up_proj.weight" in refused(
        lora_folder, base=base_folder
    )


def test_a_folder_that_is_taken_stays_as_it_is(make_complete, tmp_path):
    target = tmp_path / "converted"
    target.mkdir()
    (target / "precious").write_text("keep")
    with pytest.raises(ValueError, match="exists already; choose another folder, or pass --overwrite"):
        convert(make_complete(), target)
    assert (target / "precious").read_text() == "keep"
    convert(make_complete(), target, overwrite=True)
    assert not (target / "precious").exists()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_too_little_room_is_told_before_anything_is_written(make_complete, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"has room for 0.0 GB but 0.0 GB are to be written; free some"):
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
        "import os, sys; from tokenpacker.hf import checkpoints; from tokenpacker.hf.checkpoints import folder\n"
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
