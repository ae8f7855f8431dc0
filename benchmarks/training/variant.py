"""One variant of the training benchmark, in a process of its own so that its peak memory is its own.

    python -m benchmarks.training.variant SETTINGS FOLDER RESULT

is what `benchmarks.training` starts: the settings as a JSON text, the folder of the data, and the file for the figures.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from benchmarks.training.data import ANNOTATIONS
from benchmarks.training.meter import Meter, autocast, device
from benchmarks.training.model import build
from benchmarks.training.plain import PlainModel, shuffled_batches
from benchmarks.training.settings import Settings
from tokenpacker.data.batches import IDS, BatchMaker, FileBatches
from tokenpacker.data.plan import Planner, plan_run
from tokenpacker.data.sources import RunData, look_through
from tokenpacker.hf import TokenPackerForConditionalGeneration
from tokenpacker.sequence import IGNORED
from tokenpacker.train.config import DataConfig, OptimizerConfig, TrainingConfig
from tokenpacker.train.optimizer import part_groups
from tokenpacker.train.trainer import PartTrainer

RATE = 2e-5  # of the paper's second stage; nothing is to be learned here


def main() -> None:
    """Runs the variant and writes what was measured."""
    settings = Settings(**json.loads(sys.argv[1]))
    torch.manual_seed(0)
    model, processor = build(settings)
    config = training_config(settings, Path(sys.argv[2]))
    data = look_through(config, processor, None)
    run = run_plain if settings.variant == "plain" else run_package
    figures = run(model, config, data)
    Path(sys.argv[3]).write_text(json.dumps(figures | describe(data)), encoding="utf-8")


def training_config(settings: Settings, folder: Path) -> TrainingConfig:
    """The package's config of the run; the plain loop takes batch size, order and optimizer from it too."""
    return TrainingConfig(
        name="benchmark",
        optimizer=OptimizerConfig(learning_rate=RATE),
        train=("projector", "language_model"),
        data=DataConfig(
            path=str(folder / ANNOTATIONS),
            images=str(folder),
            max_length=settings.row_length,
            packed=settings.variant == "packed",
            num_workers=0,
        ),
        batch_size=settings.samples_per_step,
        device_batch_size=settings.samples_per_step,
        checkpointing=False,
        seed=settings.seed,
        report_to=(),
    )


def run_package(model: TokenPackerForConditionalGeneration, config: TrainingConfig, data: RunData) -> dict[str, Any]:
    """Figures of one pass over the data with the package's own batches and trainer."""
    planner = with_as_many_steps(data) if data.planner.packed else data.planner
    plan = plan_run(planner, data.lengths.tokens, data.lengths.tiles)
    batches = FileBatches(plan, data.records, BatchMaker(data.maker, data.rejects, packed=planner.packed))
    meter = Meter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = PartTrainer(
            config,
            model,
            batches,
            _arguments(f"{folder}/checkpoints"),
            forward_options={"use_cache": False, "only_learned": True},
            callbacks=[_Timing(meter)],
        )
        meter.model_built(model)
        meter.warm_up(model, lambda: model(**_inputs(batches[0])).loss)
        trainer.train()
    rows = [[int(data.lengths.tokens[row].sum()) for row in batch] for batch in plan.batches]
    return meter.result() | shape_of(rows)


def run_plain(model: TokenPackerForConditionalGeneration, config: TrainingConfig, data: RunData) -> dict[str, Any]:
    """Figures of one pass over the data with the plain loop."""
    plain = PlainModel(model).train().to(device())
    batches = list(shuffled_batches(len(data.lengths), config.batch_size, config.seed))
    optimizer = torch.optim.AdamW(part_groups(plain, config.optimizer), betas=config.optimizer.betas)
    meter = Meter()
    meter.model_built(plain)

    def loss_of(numbers: list[int]) -> Tensor:
        samples = [data.maker.make(data.records[number]) for number in numbers]
        with autocast():
            return plain(samples)

    meter.warm_up(plain, lambda: loss_of(batches[0]))
    with meter.running():
        for numbers in batches:
            loss = loss_of(numbers)
            loss.backward()
            nn.utils.clip_grad_norm_(plain.parameters(), config.optimizer.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            meter.losses.append(loss.item())
    return meter.result() | shape_of([data.lengths.tokens[batch].tolist() for batch in batches])


def with_as_many_steps(data: RunData) -> Planner:
    """The packed planner with so many rows a batch that all samples take as many steps as they do padded.

    So a step has as many samples on average, and none of the variants wins by smaller or larger batches.
    """
    steps = -(-len(data.lengths.usable) // data.planner.rows)
    one_row = replace(data.planner, rows=1)
    rows = -(-len(plan_run(one_row, data.lengths.tokens, data.lengths.tiles).batches) // steps)
    return replace(data.planner, rows=rows)


def shape_of(batches: list[list[int]]) -> dict[str, Any]:
    """Steps, rows and places, and the share of places that hold a token, from the tokens in each row of each batch."""
    places = [len(rows) * max(rows) for rows in batches]
    return {
        "steps": len(batches),
        "rows": sum(map(len, batches)),
        "places": sum(places),
        "most_places_in_a_batch": max(places),
        "fill": sum(map(sum, batches)) / sum(places),
    }


def describe(data: RunData) -> dict[str, int]:
    """How much there was to learn from."""
    samples = [data.maker.make(data.records[int(number)]) for number in data.lengths.usable]
    return {
        "samples": len(samples),
        "learned_tokens": sum(int((sample.labels != IGNORED).sum()) for sample in samples),
        "tokens": int(data.lengths.tokens.sum()),
        "longest": int(data.lengths.tokens.max()),
        "tiles": int(data.lengths.tiles.sum()),
    }


class _Timing(TrainerCallback):
    """Lets a meter run with the trainer's loop, its setting up left out."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.meter.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.meter.losses.append(logs["loss"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.meter.stop()


def _arguments(folder: str) -> TrainingArguments:
    """The trainer's settings, as `train.run` makes them, but nothing is saved or reported."""
    has_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=folder,
        num_train_epochs=1,
        per_device_train_batch_size=1,  # an item is a whole batch
        learning_rate=RATE,
        lr_scheduler_type="constant",
        bf16=has_gpu,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        train_sampling_strategy="sequential",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=has_gpu,
    )


def _inputs(batch: dict[str, Any]) -> dict[str, Any]:
    values = {key: value for key, value in batch.items() if key != IDS}
    return {key: value.to(device()) if isinstance(value, Tensor) else value for key, value in values.items()}


if __name__ == "__main__":
    main()
