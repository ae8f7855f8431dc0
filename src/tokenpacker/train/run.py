"""A training run from its config to the finished model. It can be called again and continues where it stopped.

config.model      ->  assemble.ModelBuilder  ->  model, processor
config.data       ->  data.sources           ->  batches of the whole run
config.optimizer  ->  trainer.PartTrainer    ->  steps, checkpoints
config.evaluation ->  evaluating.EvaluatingTrainer, which evaluates on the way
                      finish.finish          ->  model folder, model card
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainingArguments, set_seed

from tokenpacker.data.sources import Source, check_source, open_source, same_beginning
from tokenpacker.train.assemble import ModelBuilder, fingerprint, starts_raw, whole_weights
from tokenpacker.train.config import TrainingConfig
from tokenpacker.train.evaluating import EvaluatingTrainer
from tokenpacker.train.finish import finish
from tokenpacker.train.run_folder import RunFolder, only_training, position_in, step_of
from tokenpacker.train.scale_distillation import ScaleDistillation
from tokenpacker.train.task_scores import TaskScore, check_tasks
from tokenpacker.train.trainer import PartTrainer, training_arguments, warmup_steps

TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow", "clearml", "swanlab")


def train(config: TrainingConfig, output: Path) -> Path | None:
    """Trains a model and returns its folder, `output/model`; None if a signal stopped the run before its end.

    A run that was stopped continues from its last checkpoint when it is called again with the same config, on any
    number of processes. The settings in `run_folder.MAY_CHANGE`, such as paths, may be others, and so may the length:
    with more steps or epochs even a finished run continues. A finished run of the same length is not repeated. Each
    process of a distributed run calls this; `accelerate launch` starts them.

    Raises:
        ValueError: for data, models and settings that do not fit, and for a folder that holds another run or that
            another process trains into.
        ImportError: if a library that the settings need is missing.
        NotFiniteError, CheckpointError, WorkerError, TooManyRejects: see `PartTrainer.run`.
    """
    folder = RunFolder(output, config)
    leads = os.environ.get("RANK", "0") == "0"
    if folder.is_finished:
        return _finished_before(folder, leads)
    builder = check(config)
    arguments = training_arguments(config, output, num_workers=config.data.num_workers)
    with only_training(output) if leads else nullcontext():
        opened = _open(folder, builder, arguments, leads)
        if opened is None:
            return _finished_before(folder, leads)
        source, checkpoint, note = opened
        distillation = ScaleDistillation.of_run(config, builder.config)
        if leads and starts_raw(config):
            warnings.warn(
                "THE PROJECTOR IS NEW and is trained together with the language model; to begin with the one of stage"
                " 1, give its model with --start",
                stacklevel=2,
            )
        tasks = tasks_of(config, builder)
        asked = "".join(task.fingerprint for task in tasks)
        folder.require_same_tasks(asked)
        set_seed(config.seed)
        with whole_weights(arguments):
            model = builder.build(config)
        start = fingerprint(model, config.model)
        folder.require_same_start(start)
        arguments.distributed_state.wait_for_everyone()  # all have compared before anything is replaced
        if leads:
            folder.record(data=source.fingerprint, start=start, tasks=asked)
            print(note, *(task.warning for task in tasks), sep="", end="", file=sys.stderr)
        options: dict[str, Any] = {
            "processor": builder.processor if config.lora is None else None,
            # `only_learned` computes logits at labelled positions alone, whose number is no shape to compile for.
            "forward_options": {"use_cache": False, "only_learned": not config.compile},
            "distillation": distillation,
        }
        if config.eval_every is None:
            trainer = PartTrainer(config, model, source.batches, arguments, **options)
        else:
            options |= {"held_out": source.held_out, "tasks": tasks, "asked_by": builder.processor}
            trainer = EvaluatingTrainer(config, model, source.batches, arguments, **options)
        return finish(trainer, folder, builder.processor, source) if trainer.run(checkpoint) else None


def tasks_of(config: TrainingConfig, builder: ModelBuilder) -> list[TaskScore]:
    """The tasks that are asked on the way. Raises the errors of `TaskScore`."""
    takes_regions = builder.config.region_config is not None
    return [TaskScore(task, config.evaluation, takes_regions=takes_regions) for task in config.evaluation.tasks]


def check(config: TrainingConfig, *, with_data: bool = True) -> ModelBuilder:
    """Checks a config as far as settings and file names tell; nothing is loaded and the hub is not asked.

    Raises:
        ValueError: for data, models or trackers that do not exist.
        ImportError: for a tracker that is not installed.
    """
    if with_data:
        check_source(config)
    check_tasks(config.evaluation)
    builder = ModelBuilder.of_run(config)
    for name in config.report_to:
        if name not in TRACKERS:
            raise ValueError(f"report_to names {name!r}, which is unknown; use some of {', '.join(TRACKERS)}, or []")
        if importlib.util.find_spec(name) is None:
            package = "'tokenpacker[train]'" if name == "tensorboard" else name
            raise ImportError(
                f"report_to names {name}, which is not installed; pip install {package}, or --set report_to=[]"
            )
    return builder


def _open(
    folder: RunFolder, builder: ModelBuilder, arguments: TrainingArguments, leads: bool
) -> tuple[Source, Path | None, str] | None:
    """The batches, the checkpoint to continue from, and a note for the user. None if the run is finished already."""
    config = folder.config
    with arguments.main_process_first(desc="looking through the data"):
        if folder.is_finished:  # by another process, while this one waited for the lock
            return None
        before, checkpoint = folder.before(), folder.last_checkpoint()
        position = position_in(checkpoint)
        source = open_source(config, builder.processor, folder.path, position=position, progress=leads)
        if before is None or checkpoint is None or not folder.differs_in_length(before):
            folder.require_same_data(source.fingerprint)
            return source, checkpoint, ""
        done = step_of(checkpoint)
        if done > source.num_steps:
            raise ValueError(
                f"{folder.path} has gone {done} steps already, and this config ends after {source.num_steps}; raise"
                " max_steps or epochs, or choose another --output"
            )
        if done == source.num_steps and folder.has_model:
            return None
        shorter = replace(config, epochs=before.epochs, max_steps=before.max_steps)
        known = open_source(shorter, builder.processor, folder.path, position=position)
        folder.require_same_data(known.fingerprint)
        return source, checkpoint, _note(config, done, known, source)


def _note(config: TrainingConfig, done: int, before: Source, now: Source) -> str:
    """Tells that the run gets another length, and what would differ if it had had that length from the start."""
    schedule, found = config.optimizer, []
    lengths = {warmup_steps(schedule, source.num_steps) for source in (before, now)}
    if schedule.min_learning_rate_share < 1 or len(lengths) > 1:
        found.append("learning rates")
    if config.scale_distillation:
        found.append("teachers and their weights")
    if not same_beginning(before, now, done):
        found.append("samples")
    if config.eval_every is not None and done == before.num_steps and done % config.eval_every:
        found.append("last evaluation")
    told = f", but with the {' and '.join(found)} of the length before in its first {done} steps" if found else ""
    return f"going on from step {done}, as a run of {now.num_steps} steps{told}\n"


def _finished_before(folder: RunFolder, leads: bool) -> Path:
    if leads:
        print(f"finished before: {folder.model}; a higher max_steps or more epochs go on from there", file=sys.stderr)
    return folder.model
