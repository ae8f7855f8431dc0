"""How long a run is, how it is made longer, and that one process at a time writes into its folder."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest

from tokenpacker.data.sources import open_source
from tokenpacker.train import run_folder as checkpoints
from tokenpacker.train.assemble import load_processor
from tokenpacker.train.config import DataConfig, ScenesConfig
from tokenpacker.train.preview import preview
from tokenpacker.train.run import train
from tokenpacker.train.run_folder import LOCK
from train_runs import history


@pytest.fixture
def flat(run_config):
    """A run of 2 steps whose learning rate is the same in all steps, whatever its length."""
    optimizer = replace(run_config.optimizer, warmup_share=0.0, min_learning_rate_share=1.0)
    return replace(run_config, optimizer=optimizer, max_steps=2, save_every=100)


def weights(output):
    return (output / "model" / "model.safetensors").read_bytes()


def losses(output):
    return [entry["loss"] for entry in history(output)]


def test_more_steps_than_an_epoch_has_go_on_into_the_next_one(run_config, tmp_path):
    config = replace(run_config, epochs=1)
    processor = load_processor(config.model)
    one = open_source(config, processor, tmp_path).batches.plan
    three = open_source(replace(config, max_steps=3 * one.num_steps), processor, tmp_path).batches.plan
    assert (one.num_steps, three.num_steps) == (4, 12)
    whole = open_source(replace(config, epochs=3), processor, tmp_path).batches.plan
    assert three.batches == whole.batches
    assert preview(replace(config, max_steps=12)).steps == 12


def test_a_finished_run_says_so_and_is_not_repeated(flat, tmp_path, capsys):
    model = train(flat, tmp_path)
    before = weights(tmp_path), (tmp_path / "history.json").stat().st_mtime_ns
    capsys.readouterr()
    assert train(flat, tmp_path) == model
    assert capsys.readouterr().err.startswith(f"finished before: {model}; a higher max_steps or more epochs go on")
    assert before == (weights(tmp_path), (tmp_path / "history.json").stat().st_mtime_ns)


def test_a_finished_run_goes_on_to_what_a_longer_one_would_have_been(flat, tmp_path, capsys):
    train(flat, tmp_path / "longer")
    train(replace(flat, max_steps=5), tmp_path / "longer")
    assert "going on from step 2, as a run of 5 steps\n" in capsys.readouterr().err
    train(replace(flat, max_steps=5), tmp_path / "whole")
    assert weights(tmp_path / "longer") == weights(tmp_path / "whole")
    assert losses(tmp_path / "longer") == losses(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"has gone 5 steps already, and this config ends after 3; raise max_steps"):
        train(replace(flat, max_steps=3), tmp_path / "longer")


def test_a_longer_run_takes_the_learning_rates_of_its_new_length_from_there(flat, run_config, tmp_path, capsys):
    cosine = replace(flat, optimizer=run_config.optimizer, max_steps=3)
    train(cosine, tmp_path / "longer")
    train(replace(cosine, max_steps=5), tmp_path / "longer")
    told = "going on from step 3, as a run of 5 steps, but with the learning rates of the length before in its first 3"
    assert told in capsys.readouterr().err
    train(replace(cosine, max_steps=5), tmp_path / "whole")
    rates = [[entry["learning_rate"] for entry in history(tmp_path / name)] for name in ("longer", "whole")]
    assert rates[0][3:] == rates[1][3:]
    assert rates[0][:3] != rates[1][:3]
    assert weights(tmp_path / "longer") != weights(tmp_path / "whole")


def test_without_a_terminal_the_steps_and_their_loss_are_plain_lines(flat, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tokenpacker.progress.FIRST_LINE_SECONDS", 0)
    train(flat, tmp_path)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("small: ")]
    assert lines[0].startswith("small: 1 of 2 (0:00:0")
    assert lines[-1].startswith("small: 2 of 2 (0:00:0")
    assert lines[-1].endswith(f"; loss {losses(tmp_path)[-1]:.3f}")


def test_without_checkpoints_a_finished_run_is_the_start_of_another(flat, tmp_path):
    model = train(flat, tmp_path)
    for folder in checkpoints.whole_checkpoints(tmp_path / "checkpoints"):
        checkpoints.remove_checkpoint(folder)
    with pytest.raises(ValueError, match=rf"has no checkpoint left to go on from; give --start {model}"):
        train(replace(flat, max_steps=5), tmp_path)


def test_a_short_run_has_a_curve_and_its_first_and_last_loss(flat, tmp_path):
    config = replace(flat, log_every=25)
    train(config, tmp_path)
    first, last = losses(tmp_path)
    assert f"| {first:.4f} to {last:.4f} |" in (tmp_path / "model" / "README.md").read_text()


def test_a_refused_run_leaves_no_config(flat, tmp_path):
    missing = replace(flat.data, path=str(tmp_path / "nope.json"))
    with pytest.raises(ValueError, match=r"data file .*nope.json does not exist"):
        train(replace(flat, data=missing), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "bad.json").write_text('[{"conversations": []}]')
    with pytest.raises(ValueError, match=r"more than data.max_reject_share=0.01 allows.* raise data.max_reject_share"):
        train(replace(flat, data=replace(flat.data, path=str(tmp_path / "bad.json"))), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"data": replace(c.data, scenes=ScenesConfig(captions=1.0))}, "data.path and data.scenes exclude"),
        (lambda c: {"data": DataConfig(scenes=ScenesConfig(captions=1.0))}, "data.scenes needs batch_size=1"),
        (lambda c: {"data": replace(c.data, path="nope.json")}, "data file nope.json does not exist"),
        (lambda c: {"data": replace(c.data, images="nope")}, "images_root=nope is no folder"),
        (lambda c: {"data": replace(c.data, path="nope.tar")}, "shard nope.tar does not exist"),
        (lambda c: {"report_to": ("nothing",)}, "report_to names 'nothing', which is unknown"),
        (lambda c: {"model": replace(c.model, start="./nope")}, "model ./nope does not exist"),
        (lambda c: {"model": replace(c.model, projector_weights="nope")}, "projector_weights=nope does not exist"),
    ],
)
def test_a_preview_refuses_what_the_run_refuses_before_the_hub_is_asked(
    run_config, tmp_path, monkeypatch, change, message
):
    monkeypatch.setattr("tokenpacker.hub.hub_problem", lambda: pytest.fail("the hub was asked"))
    config = replace(run_config, max_steps=3)
    config = replace(config, **change(config))
    for call in (preview, lambda config: train(config, tmp_path / "run")):
        with pytest.raises(ValueError, match=message):
            call(config)
    assert not (tmp_path / "run").exists()


def test_a_missing_file_is_told_before_a_missing_logger_and_that_with_its_remedy(run_config, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "tensorboard" else find_spec(name))
    config = replace(run_config, max_steps=3, report_to=("tensorboard",))
    with pytest.raises(ValueError, match=r"data file nope.json does not exist"):
        preview(replace(config, data=replace(config.data, path="nope.json")))
    with pytest.raises(ImportError, match=r"which is not installed; pip install 'tokenpacker\[train\]', or"):
        preview(config)


HOLD = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_runs_do_not_write_into_one_folder_and_a_killed_one_does_not_block(flat, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "LOCK_SECONDS", 0.2)
    command = [sys.executable, "-c", HOLD, str(tmp_path / LOCK)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"another process trains into {tmp_path}; wait for its end, or choose"):
            train(flat, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]
        other.kill()
    assert train(flat, tmp_path) == tmp_path / "model"
