"""Several processes compute what one does, may be killed, and may be others when the run goes on.

Sums over processes come in another order than in one process, so that float32 results agree to 1e-6 and not to a bit.
"""

from __future__ import annotations

import signal
from collections import Counter
from dataclasses import replace

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file

from tokenpacker.data.collate import collate_padded
from tokenpacker.data.sources import look_through
from tokenpacker.hf import TokenPackerForConditionalGeneration
from tokenpacker.train.assemble import load_processor
from train_runs import Death, Start, error, history, seen, sharded_step, start

pytestmark = pytest.mark.slow

KILLED = -signal.SIGKILL
resumes = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.19"),
    reason="transformers then looked for the optimizer's state on the device cpu:0, which torch does not know",
)

TOLERANCE = 1e-6


def assert_close(output, finished):
    losses = [[entry["loss"] for entry in history(folder)] for folder in (output, finished)]
    assert losses[0] == pytest.approx(losses[1], abs=TOLERANCE)


@pytest.fixture(scope="module")
def finished_by_two(run_config, tmp_path_factory):
    """The output of two processes that nothing disturbed."""
    output = tmp_path_factory.mktemp("two")
    assert start(Start(run_config.to_dict(), output, num_processes=2)) == [0, 0]
    return output


def test_two_processes_lose_what_one_loses(finished, finished_by_two):
    assert_close(finished_by_two, finished)
    assert sorted(seen(finished_by_two)) == sorted(seen(finished))  # and in the same steps


@resumes
def test_two_processes_that_are_killed_end_as_two_that_are_not(run_config, finished_by_two, tmp_path):
    config = run_config.to_dict()
    for count, delay in ((9, 0.01), (2, 0.0), (15, 0.03)):  # a process has two batches of a step
        codes = start(Start(config, tmp_path, num_processes=2, death=Death("step", count, delay)))
        assert KILLED in codes
    assert start(Start(config, tmp_path, num_processes=2)) == [0, 0]
    assert_close(tmp_path, finished_by_two)
    assert sorted(seen(tmp_path)) == sorted(seen(finished_by_two))
    weights, expected = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path, finished_by_two))
    torch.testing.assert_close(weights, expected, rtol=0, atol=TOLERANCE)


@resumes
@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1), (2, 4)])
def test_another_number_of_processes_sees_each_sample_once_in_an_epoch(run_config, finished, tmp_path, first, then):
    config = run_config.to_dict()
    assert KILLED in start(Start(config, tmp_path, num_processes=first, death=Death("step", 4 * 8 // first)))
    assert set(start(Start(config, tmp_path, num_processes=then))) == {0}
    assert_close(tmp_path, finished)
    assert sorted(seen(tmp_path)) == sorted(seen(finished))
    steps_per_epoch = 4  # 26 samples, 8 in a step
    epochs = {step // steps_per_epoch for step, _ in seen(tmp_path)}
    assert epochs == set(range(5))
    for epoch in epochs:
        counts = Counter(id for step, id in seen(tmp_path) if step // steps_per_epoch == epoch)
        assert counts == Counter(f"s{number}" for number in range(26))


@resumes
def test_one_signal_stops_all_processes_after_the_same_step(run_config, finished_by_two, tmp_path):
    config = run_config.to_dict()
    assert start(Start(config, tmp_path, num_processes=2, signals=[(0.0, signal.SIGTERM)])) == [0, 0]
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-2"]
    assert start(Start(config, tmp_path, num_processes=2)) == [0, 0]
    assert_close(tmp_path, finished_by_two)


def test_a_number_of_processes_that_a_step_cannot_be_shared_by_is_refused(run_config, tmp_path):
    assert 3 in start(Start(run_config.to_dict(), tmp_path, num_processes=3))
    assert "4 batches of device_batch_size=2, which 3 processes cannot share" in error(tmp_path)


def test_fsdp_that_becomes_ddp_is_told(run_config, tmp_path):
    config = replace(run_config, max_steps=1).to_dict()
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    assert start(Start(config, tmp_path, num_processes=2, environment=asked)) == [0, 0]
    assert "FSDP WAS ASKED FOR AND IS NOT USED" in (tmp_path / "warnings.txt").read_text()


def test_fsdp2_on_two_processes_computes_what_one_model_computes(run_config, tiny_model_dir):
    """torch's `fully_shard` itself: accelerate refuses FSDP on a CPU, so what it adds is not tested here.

    In the first step one process has images and the other text alone, in the second both have images.
    """
    data = look_through(run_config, load_processor(run_config.model), None)
    samples = [[1, 2], [0, 4], [3, 5], [7, 8]]
    batches = [collate_padded([data.maker.make(data.records[n]) for n in numbers], 0) for numbers in samples]
    assert [len(batch["tile_index"]) > 0 for batch in batches] == [True, False, True, True]
    steps = [batches[:2], batches[2:]]

    model = TokenPackerForConditionalGeneration.from_pretrained(tiny_model_dir)
    model.model.vision_tower.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    expected = []
    for step in steps:
        targets = sum((batch["labels"][:, 1:] != -100).sum() for batch in step)
        losses = [model(**batch, num_items_in_batch=targets).loss for batch in step]
        sum(losses).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        optimizer.step()
        optimizer.zero_grad()
        expected.append((float(sum(losses).detach()), float(norm)))

    sharded = sharded_step(tiny_model_dir, steps)
    for found, wanted in zip(sharded, expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-5)


@resumes
def test_a_finished_run_is_made_longer_by_two_processes(run_config, tmp_path):
    optimizer = replace(run_config.optimizer, warmup_share=0.0, min_learning_rate_share=1.0)
    short = replace(run_config, optimizer=optimizer, max_steps=2)
    longer = replace(short, max_steps=4).to_dict()
    assert start(Start(short.to_dict(), tmp_path / "longer", num_processes=2)) == [0, 0]
    assert start(Start(longer, tmp_path / "longer", num_processes=2)) == [0, 0]
    assert start(Start(longer, tmp_path / "longer", num_processes=2)) == [0, 0]  # says that it is finished
    assert start(Start(longer, tmp_path / "whole", num_processes=2)) == [0, 0]
    assert seen(tmp_path / "longer") == seen(tmp_path / "whole")
    losses = [[entry["loss"] for entry in history(tmp_path / name)] for name in ("longer", "whole")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
