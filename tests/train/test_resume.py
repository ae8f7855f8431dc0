"""Nothing is lost: a run that is killed, stopped or fails goes on, and ends where it would have ended.

"The same" is bit for bit here: one process on a CPU adds its numbers in one order.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tar_shards import write_tar
from tokenpacker.hf import TokenPackerForConditionalGeneration
from tokenpacker.train.config import LoraConfig
from tokenpacker.train.run_folder import COMPLETE, whole_checkpoints
from train_runs import Death, Start, error, history, seen, start

pytestmark = pytest.mark.slow

KILLED = -signal.SIGKILL


def assert_same(output: Path, finished: Path) -> None:
    """Weights, curve and samples are those of the run that nothing disturbed."""
    assert history(output) == history(finished)
    assert seen(output) == seen(finished)
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (output, finished)]
    assert weights[0] == weights[1]


def leftovers(output: Path) -> list[Path]:
    folders = list((output / "checkpoints").glob("checkpoint-*"))
    return [folder for folder in folders if not (folder / COMPLETE).exists()]


def test_a_run_that_is_killed_ten_times_ends_as_one_that_is_not(run_config, finished, tmp_path):
    chance = random.Random(4)
    # A step is 4 batches, a checkpoint some 60 file operations: of its making, its mark, and the end of the one before.
    deaths = [Death("step", chance.randint(1, 12), chance.uniform(0, 0.05)) for _ in range(5)]
    deaths += [Death("file", chance.randint(1, 75)) for _ in range(5)]
    chance.shuffle(deaths)
    config = replace(run_config, save_every=2).to_dict()
    half_written = 0
    for death in deaths:
        assert start(Start(config, tmp_path, death=death)) == [KILLED]
        half_written += len(leftovers(tmp_path))
    assert half_written > 0  # or no checkpoint was hit
    assert start(Start(config, tmp_path)) == [0]
    assert not leftovers(tmp_path)
    assert_same(tmp_path, finished)


def test_a_checkpoint_without_its_mark_is_removed_and_never_read(run_config, finished, tmp_path):
    assert start(Start(run_config.to_dict(), tmp_path, death=Death("step", 4 * 4))) == [KILLED]
    (whole,) = whole_checkpoints(tmp_path / "checkpoints")
    half = whole.with_name("checkpoint-4")
    shutil.copytree(whole, half)
    (half / COMPLETE).unlink()
    (half / "optimizer.pt").write_bytes(b"half")
    assert start(Start(run_config.to_dict(), tmp_path)) == [0]
    assert not half.exists()
    assert_same(tmp_path, finished)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_with_a_checkpoint(run_config, finished, tmp_path, number):
    """To the whole group and twice, as schedulers and launchers send it: workers go on, and the echo is no second."""
    config = replace(run_config, data=replace(run_config.data, num_workers=2)).to_dict()
    assert start(Start(config, tmp_path, signals=[(0.0, number), (0.1, number)])) == [0]
    assert [folder.name for folder in whole_checkpoints(tmp_path / "checkpoints")] == ["checkpoint-2"]
    assert not (tmp_path / "model").exists()
    assert start(Start(config, tmp_path)) == [0]
    assert_same(tmp_path, finished)


def test_a_second_signal_ends_a_run_at_once(run_config, tmp_path):
    signals = [(0.0, signal.SIGINT), (1.2, signal.SIGTERM)]
    assert start(Start(run_config.to_dict(), tmp_path, signals=signals)) == [-signal.SIGTERM]
    assert not whole_checkpoints(tmp_path / "checkpoints")


def test_a_loss_that_is_no_number_stops_a_run_and_names_its_samples(run_config, tmp_path):
    hot = replace(run_config.optimizer, learning_rate=1e30, part_learning_rates={})
    config = replace(run_config, optimizer=hot, save_every=1).to_dict()
    assert start(Start(config, tmp_path)) == [3]
    report = json.loads((tmp_path / "checkpoints" / "0-not_finite.json").read_text())
    (whole,) = whole_checkpoints(tmp_path / "checkpoints")
    assert whole.name == f"checkpoint-{report['step'] - 1}"
    of_step = [id for step, id in seen(tmp_path) if step == report["step"] - 1]
    assert report["ids"] == of_step[: len(report["ids"])] != []
    assert error(tmp_path).startswith(f"NotFiniteError: the {report['what']} of step {report['step']} is")
    assert report["ids"][0] in error(tmp_path)
    TokenPackerForConditionalGeneration.from_pretrained(whole)


@pytest.mark.parametrize("max_file_bytes", [300_000, 440_000], ids=["in the weights", "in the optimizer's state"])
def test_a_full_disk_leaves_the_last_checkpoint(run_config, finished, tmp_path, max_file_bytes):
    assert start(Start(run_config.to_dict(), tmp_path, max_file_bytes=max_file_bytes)) == [3]
    assert "checkpoint-6 could not be written" in error(tmp_path)
    assert "checkpoint-3, is whole" in error(tmp_path)
    assert [folder.name for folder in (tmp_path / "checkpoints").glob("checkpoint-*")] == ["checkpoint-3"]
    assert start(Start(run_config.to_dict(), tmp_path)) == [0]
    assert_same(tmp_path, finished)


def test_a_killed_worker_is_told_and_costs_nothing(run_config, finished, tmp_path):
    config = replace(run_config, data=replace(run_config.data, num_workers=1)).to_dict()
    assert start(Start(config, tmp_path, kills_worker=True)) == [3]
    assert error(tmp_path).startswith("WorkerError: a process that reads data was killed")
    assert start(Start(config, tmp_path)) == [0]
    assert_same(tmp_path, finished)


@pytest.fixture
def damaged(training_data, tmp_path):
    """The data with three pictures cut off behind their headers: only decoding finds these."""
    folder = tmp_path / "damaged"
    shutil.copytree(training_data.parent, folder)
    for name in ("1-0.png", "2-0.png", "3-1.png"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
    return folder / "data.json"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_picture_costs_its_own_sample_and_is_written_down_once(run_config, damaged, tmp_path, num_workers):
    data = replace(run_config.data, path=str(damaged), max_reject_share=0.5, num_workers=num_workers)
    config = replace(run_config, data=data, epochs=2).to_dict()
    assert start(Start(config, tmp_path, death=Death("step", 4 * 6))) == [KILLED]
    assert start(Start(config, tmp_path)) == [0]
    lines = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert sorted({line["id"] for line in lines}) == ["s1", "s2", "s3"]
    assert len(lines) <= 3 * max(1, num_workers)  # two workers may meet one, each in its own epoch
    assert sorted(id for _, id in seen(tmp_path)) == sorted(2 * [f"s{n}" for n in range(26) if n not in (1, 2, 3)])


def test_too_many_damaged_pictures_stop_a_run_with_their_counts(run_config, damaged, tmp_path):
    data = replace(run_config.data, path=str(damaged), num_workers=2)
    assert start(Start(replace(run_config, data=data).to_dict(), tmp_path)) == [3]
    assert error(tmp_path).startswith("TooManyRejects: ")
    assert "unreadable image" in error(tmp_path)
    assert "\n" not in error(tmp_path)


def test_data_may_move_but_not_change(run_config, training_data, finished, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(training_data.parent, moved)
    assert start(Start(run_config.to_dict(), tmp_path, death=Death("step", 4 * 4))) == [KILLED]
    config = replace(run_config, data=replace(run_config.data, path=str(moved / "data.json"))).to_dict()
    rows = json.loads((moved / "data.json").read_text())
    (moved / "data.json").write_text(json.dumps(rows[:-1]))
    assert start(Start(config, tmp_path)) == [3]
    assert "gives other samples" in error(tmp_path)
    (moved / "data.json").write_text(json.dumps(rows))
    assert start(Start(config, tmp_path)) == [0]
    assert_same(tmp_path, finished)


def test_packed_rows_go_on_where_they_stopped(packed_config, tmp_path):
    config = replace(packed_config, max_steps=8).to_dict()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(Start(config, whole)) == [0]
    for count in (4 * 5, 4 * 3):
        assert start(Start(config, killed, death=Death("step", count))) == [KILLED]
    assert whole_checkpoints(killed / "checkpoints")
    assert start(Start(config, killed)) == [0]
    assert_same(killed, whole)


def test_a_lora_run_resumes_its_updates_and_its_projector(run_config, tiny_model, tmp_path):
    lora = LoraConfig(rank=4, alpha=8, dropout=0.1)  # dropout needs the random state too
    config = replace(run_config, train=("projector",), lora=lora, epochs=2).to_dict()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(Start(config, whole)) == [0]
    assert start(Start(config, killed, death=Death("step", 4 * 5))) == [KILLED]
    assert start(Start(config, killed)) == [0]
    assert_same(killed, whole)
    before = tiny_model.state_dict()
    after = TokenPackerForConditionalGeneration.from_pretrained(killed / "model").state_dict()
    changed = {name for name, tensor in after.items() if not tensor.equal(before[name])}
    assert {name for name in changed if ".multi_modal_projector." not in name} == {
        name for name in before if "language_model" in name and "_proj." in name
    }
    assert any(".multi_modal_projector." in name for name in changed)
    projector = load_file(killed / "projector.safetensors")
    assert all(tensor.equal(after[f"model.multi_modal_projector.{name}"]) for name, tensor in projector.items())


@pytest.fixture
def stream_config(run_config, training_data, tmp_path):
    """The same samples in two tar shards, 26 steps of them: a few epochs."""
    rows = json.loads(training_data.read_text())
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, part in enumerate((rows[:15], rows[15:])):
        files = {}
        for row in part:
            names = row.pop("image", [])
            for place, name in enumerate([names] if isinstance(names, str) else names):
                files[f"{row['id']}.{place}.png"] = (training_data.parent / name).read_bytes()
            files[f"{row['id']}.json"] = json.dumps(row).encode()
        write_tar(folder / f"{number}.tar", files)
    return replace(run_config, data=replace(run_config.data, path=str(folder), num_workers=2), max_steps=14)


def test_a_stream_goes_on_where_it_stopped(stream_config, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(Start(stream_config.to_dict(), whole)) == [0]
    for count in (4 * 5, 4 * 4):  # in the sixth step, and of the rest in the fourth
        assert start(Start(stream_config.to_dict(), killed, death=Death("step", count))) == [KILLED]
    assert (whole_checkpoints(killed / "checkpoints")[-1] / "position.json").is_file()
    assert start(Start(stream_config.to_dict(), killed)) == [0]
    assert_same(killed, whole)
    in_order = [id for _, id in seen(whole)]
    epochs = [in_order[start : start + 26] for start in (0, 26, 52)]
    assert all(sorted(epoch) == sorted(f"s{number}" for number in range(26)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_stream_goes_on_with_another_number_of_processes(stream_config, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(Start(stream_config.to_dict(), whole)) == [0]
    assert KILLED in start(Start(stream_config.to_dict(), killed, num_processes=2, death=Death("step", 2 * 5)))
    assert start(Start(stream_config.to_dict(), killed)) == [0]
    assert sorted(seen(killed)) == sorted(seen(whole))
    losses = [[entry["loss"] for entry in history(folder)] for folder in (killed, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.pt", "model.safetensors", "rng_state.pth"])
def test_a_damaged_checkpoint_is_named_with_the_way_on(run_config, finished, tmp_path, name):
    assert start(Start(run_config.to_dict(), tmp_path, death=Death("step", 4 * 4))) == [KILLED]
    (whole,) = whole_checkpoints(tmp_path / "checkpoints")
    content = (whole / name).read_bytes()
    (whole / name).write_bytes(content[: len(content) // 2])
    assert start(Start(run_config.to_dict(), tmp_path)) == [3]
    assert error(tmp_path).startswith(f"CheckpointError: checkpoint {whole} is damaged (")
    assert "\n" not in error(tmp_path)
    shutil.rmtree(whole)
    assert start(Start(run_config.to_dict(), tmp_path)) == [0]
    assert_same(tmp_path, finished)


class _Touch:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_checkpoint_that_wants_to_run_code_is_not_let(run_config, tmp_path):
    assert start(Start(run_config.to_dict(), tmp_path, death=Death("step", 4 * 4))) == [KILLED]
    (whole,) = whole_checkpoints(tmp_path / "checkpoints")
    torch.save({"state": _Touch(str(tmp_path / "ran"))}, whole / "optimizer.pt")
    assert start(Start(run_config.to_dict(), tmp_path)) == [3]
    assert "is damaged" in error(tmp_path)
    assert not (tmp_path / "ran").exists()
