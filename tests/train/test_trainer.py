"""The engine computes what a plain loop computes, and says loudly where it cannot."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from tokenpacker.data.rejects import TooManyRejects
from tokenpacker.data.sources import look_through
from tokenpacker.train.assemble import assemble, starts_raw
from tokenpacker.train.config import ModelConfig
from tokenpacker.train.optimizer import part_of
from tokenpacker.train.run_folder import COMPLETE, mark_whole, remove_leftovers, whole_checkpoints
from tokenpacker.train.trainer import WorkerError, clear_worker_errors, warn_of_other_engine
from train_runs import Start, history, seen, start

IGNORED = -100
NUM_STEPS = 20


def reference_losses(config, rows_at_once):
    """The losses of a plain loop over the steps' samples, `rows_at_once` of them padded together."""
    torch.set_num_threads(1)
    model, processor = assemble(config)
    model.train()
    data = look_through(config, processor, None)
    learning = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            learning["projector" in name].append(parameter)
    rates = (config.optimizer.learning_rate, config.optimizer.part_learning_rates["projector"])
    optimizer = torch.optim.AdamW([{"params": learning[kind]} for kind in (False, True)], weight_decay=0.0)
    warmup = math.ceil(config.optimizer.warmup_share * data.plan.num_steps)
    losses = []
    for step in range(data.plan.num_steps):
        progress = (step - warmup) / (data.plan.num_steps - warmup)
        share = step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * progress))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share
        batches = data.plan.batches[step * data.plan.batches_per_step :][: data.plan.batches_per_step]
        samples = [[data.maker.make(data.records[n]) for row in batch for n in row] for batch in batches]
        num_targets = sum(int((sample.labels != IGNORED).sum()) for batch in samples for sample in batch)
        total = torch.zeros(())
        for batch in samples:
            for place in range(0, len(batch), rows_at_once):
                loss = summed_loss(model, batch[place : place + rows_at_once]) / num_targets
                loss.backward()
                total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total))
    return losses


def summed_loss(model, samples):
    """The cross-entropy of all learned tokens of some samples, padded by hand.

    Text alone comes with no tiles rather than no pixels: the projector then gets a gradient of zero, as it must where
    another process has images, and AdamW goes on by its momentum.
    """
    ids = pad_sequence([sample.input_ids for sample in samples], batch_first=True)
    labels = pad_sequence([sample.labels for sample in samples], batch_first=True, padding_value=IGNORED)
    mask = pad_sequence([sample.attention_mask for sample in samples], batch_first=True)
    pixels = torch.cat([sample.pixel_values for sample in samples])
    logits = model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


@pytest.mark.slow
def test_twenty_steps_lose_what_a_plain_loop_loses(run_config, finished):
    losses = [entry["loss"] for entry in history(finished)]
    expected = reference_losses(run_config, rows_at_once=run_config.device_batch_size)
    assert len(losses) == NUM_STEPS
    # 1e-6 of losses near 5 is two units in float32's last place.
    assert losses == pytest.approx(expected, abs=1e-6)
    assert losses[-1] < losses[0] - 0.5  # or nothing was learned that could differ


@pytest.mark.slow
def test_packed_rows_lose_what_their_samples_lose_alone(packed_config, tmp_path):
    config = replace(packed_config, max_steps=NUM_STEPS)
    assert start(Start(config.to_dict(), tmp_path)) == [0]
    losses = [entry["loss"] for entry in history(tmp_path)]
    per_step = len(seen(tmp_path)) / NUM_STEPS
    assert per_step > 1.5 * config.batch_size  # samples do share rows
    assert len(losses) == NUM_STEPS
    # Longer sums in another order, carried through twenty optimizer steps.
    assert losses == pytest.approx(reference_losses(config, rows_at_once=1), abs=1e-5)


def test_each_parameter_belongs_to_a_part():
    assert part_of("model.vision_tower.encoder.layers.0.weight") == "vision_tower"
    assert part_of("model.spare_vision_layers.0.weight") == "vision_tower"
    assert part_of("base_model.model.model.region_encoder.output_proj.weight") == "regions"
    assert part_of("base_model.model.model.multi_modal_projector.query_proj.weight") == "projector"
    assert part_of("module.lm_head.weight") == part_of("model.language_model.norm.weight") == "language_model"


def test_checkpoints_count_once_they_are_marked(tmp_path):
    for step in (3, 20, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "weights").write_bytes(b"1")
    for step in (100, 20):
        mark_whole(tmp_path / f"checkpoint-{step}")
    assert [folder.name for folder in whole_checkpoints(tmp_path)] == ["checkpoint-20", "checkpoint-100"]
    (tmp_path / "checkpoint-20" / COMPLETE).unlink()
    remove_leftovers(tmp_path)
    assert [folder.name for folder in tmp_path.iterdir()] == ["checkpoint-100"]


def test_an_engine_that_is_not_used_is_told_loudly(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.warns(UserWarning, match="FSDP WAS ASKED FOR AND IS NOT USED"):
        warn_of_other_engine(is_fsdp=False, is_deepspeed=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_other_engine(is_fsdp=True, is_deepspeed=False)


def test_errors_of_workers_become_one_line():
    text = (
        'Caught TooManyRejects in DataLoader worker process 0.\nTraceback:\n  File "x"\na.b.TooManyRejects: 3 of 4: bad'
    )
    with pytest.raises(TooManyRejects, match=r"^3 of 4: bad$"), clear_worker_errors():
        raise TooManyRejects(text)
    with pytest.raises(TooManyRejects, match=r"^3 of 4: bad$"), clear_worker_errors():
        raise TooManyRejects("3 of 4: bad")
    with pytest.raises(WorkerError, match=r"data\.num_workers"), clear_worker_errors():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    with pytest.raises(RuntimeError, match=r"^other$"), clear_worker_errors():
        raise RuntimeError("other")


def test_the_end_of_another_process_is_told_in_one_line(monkeypatch):
    lost = "[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1234"
    with pytest.raises(RuntimeError, match="gloo"), clear_worker_errors():
        raise RuntimeError(lost)  # one process alone has no other
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(WorkerError, match=r"another process of this run ended"), clear_worker_errors():
        raise RuntimeError(lost)


def test_a_new_projector_beside_a_language_model_that_learns_is_told_loudly(run_config):
    assert not starts_raw(run_config)
    assert starts_raw(replace(run_config, model=ModelConfig()))
    assert not starts_raw(replace(run_config, model=ModelConfig(), train=("projector",)))  # as stage 1 does
