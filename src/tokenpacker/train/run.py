"""A training run from its config to the finished model: resumable, with everything it saw and did written down."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PrinterCallback, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer import TRAINING_ARGS_NAME

from tokenpacker.data.batches import only_item
from tokenpacker.data.sources import Source, check_source, open_source, same_beginning
from tokenpacker.hf.versions import RECOMPUTATION
from tokenpacker.train.assemble import (
    assemble,
    check_models,
    learns_regions,
    load_processor,
    merged_model,
    save_projector,
)
from tokenpacker.train.config import TrainingConfig
from tokenpacker.train.config_reading import from_dict
from tokenpacker.train.loop import ProgressBar, Stopwatch, deterministic_on_cpu, log_interval, write_whole
from tokenpacker.train.saving import (
    CheckpointError,
    check_state,
    locked,
    position_in,
    remove_leftovers,
    step_of,
    whole_checkpoints,
)
from tokenpacker.train.signals import StopOnSignal
from tokenpacker.train.summary import write_report
from tokenpacker.train.trainer import PartTrainer

CONFIG, DATA, START, CHECKPOINTS, MODEL, HISTORY, STOPWATCH = (
    "config.json",
    "data.json",
    "start.json",
    "checkpoints",
    "model",
    "history.json",
    "seconds.json",
)

# What may differ when a run is called again: where models and data lie, and what changes no weight; and its length.
LENGTH = ("epochs", "max_steps")
MAY_CHANGE = (
    "model.start",
    "model.vision_tower",
    "model.language_model",
    "model.projector_weights",
    "keep_checkpoints",
    "log_every",
    "report_to",
    "save_every",
    "data.path",
    "data.images",
    "data.max_reject_share",
    "data.num_workers",
)
TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow", "clearml", "swanlab")


def train(config: TrainingConfig, output: Path) -> Path | None:
    """Trains and returns the folder of the finished model, `output/model`; None where a signal ended the run before.

    A finished run is not repeated. One that was stopped goes on from its last whole checkpoint when it is called again
    with the same config, on any number of processes; paths, as long as the same lies there, and what else is in
    `MAY_CHANGE` may be others. So may the length: with more steps or epochs a run goes on, a finished one too. Each
    process of a distributed run calls this; `accelerate launch` starts them.

    Raises:
        ValueError: for data, models and settings that do not fit, and for a folder that holds another run or that
            another process trains into.
        CheckpointError: when the disk is full; the last checkpoint stays.
        WorkerError: when a process that reads data is killed.
        TooManyRejects: when too much of the data is bad.
        NotFiniteError: when a loss or gradient is none.
    """
    if _is_finished(config, output):
        return _finished_before(output, leads=os.environ.get("RANK", "0") == "0")
    check(config)
    arguments = _arguments(config, output)  # starts the process group
    leads = arguments.process_index == 0
    with locked(output) if leads else nullcontext():
        return _train(config, output, arguments, leads)


def check(config: TrainingConfig, *, with_data: bool = True) -> None:
    """Raises what `train` would, as far as settings and names of files tell: nothing is loaded, no hub is asked."""
    if with_data:
        check_source(config)
    check_models(config.model)
    _require_trackers(config.report_to)


def _train(config: TrainingConfig, output: Path, arguments: TrainingArguments, leads: bool) -> Path | None:
    notes: list[str] = []
    with arguments.main_process_first(desc="looking through the data"):
        before = _run_before(config, output)
        finished = (output / MODEL).is_dir() and (output / HISTORY).is_file()
        if _is_finished(config, output):  # while this process waited
            return _finished_before(output, leads)
        checkpoint = next(reversed(whole_checkpoints(output / CHECKPOINTS)), None)
        if finished and checkpoint is None:
            raise ValueError(
                f"{output} has no checkpoint left to go on from; give --start {output / MODEL} and another --output"
            )
        if checkpoint is not None:
            check_state(checkpoint)
        processor = load_processor(config.model, with_regions=learns_regions(config))
        source = known = open_source(config, processor, output, position=position_in(checkpoint), progress=leads)
        if before is not None and checkpoint is not None and _length(before) != _length(config):
            known = open_source(_with_length(config, before), processor, output, position=position_in(checkpoint))
            done = step_of(checkpoint)
            if done > source.num_steps:
                raise ValueError(
                    f"{output} has gone {done} steps already, and this config ends after {source.num_steps}; raise"
                    " max_steps or epochs, or choose another --output"
                )
            if done == source.num_steps and finished:
                return _finished_before(output, leads)
            notes = _differences(config, done, known, source)
        _require_same_data(config, known, output)
    arguments.warmup_steps = _warmup_steps(config, source)
    arguments.logging_steps = log_interval(config.log_every, source.num_steps)
    if leads and _starts_raw(config):
        warnings.warn(
            "THE PROJECTOR IS NEW and learns together with the language model; to begin with the one of stage 1, give"
            " its model with --start",
            stacklevel=3,
        )
    set_seed(config.seed)
    with _whole_weights(arguments):
        model, processor = assemble(config)
    start = _fingerprint_of_start(config, model)
    _require_same_start(start, output)
    arguments.distributed_state.wait_for_everyone()  # all have compared before anything is replaced
    if leads:
        (output / HISTORY).unlink(missing_ok=True)  # a finished run that goes on is not finished
        for name, text in ((DATA, _digest(source.fingerprint)), (START, _digest(start)), (CONFIG, config.to_json())):
            write_whole(output / name, text)
        remove_leftovers(output / CHECKPOINTS)
        for note in notes:
            print(note, file=sys.stderr)
    stop, stopwatch = StopOnSignal(), Stopwatch(output / STOPWATCH)
    trainer = PartTrainer(
        model=model,
        args=arguments,
        train_dataset=source.batches,
        data_collator=only_item,
        optimizer_config=config.optimizer,
        keep_checkpoints=config.keep_checkpoints,
        processor=processor if config.lora is None else None,
        callbacks=[stop, stopwatch, ProgressBar(config.name)],
    )
    trainer.remove_callback(PrinterCallback)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = str(output / "tensorboard")  # one curve, however often the run is called again
    with stop, deterministic_on_cpu():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trainer.state.global_step < source.num_steps:
        kept = whole_checkpoints(output / CHECKPOINTS)[-1]
        if leads:
            print(
                f"stopped at step {trainer.state.global_step} of {source.num_steps}; {kept} is kept, and the same"
                " command goes on from it",
                file=sys.stderr,
            )
        return None
    try:
        return _finish(trainer, processor, config, source, output, stopwatch.seconds)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(output / f"{MODEL}.part", ignore_errors=True)  # a full disk may need the room
        raise CheckpointError(
            f"model {output / MODEL} could not be written ({' '.join(str(error).split())}); the last checkpoint is"
            " whole: make room and call the run again"
        ) from error


def _is_finished(config: TrainingConfig, output: Path) -> bool:
    """Whether the run is done, in this length. Raises ValueError as `_run_before`."""
    before = _run_before(config, output)
    is_whole = (output / MODEL).is_dir() and (output / HISTORY).is_file()
    return is_whole and before is not None and _length(before) == _length(config)


def _finished_before(output: Path, leads: bool) -> Path:
    if leads:
        print(f"finished before: {output / MODEL}; a higher max_steps or more epochs go on from there", file=sys.stderr)
    return output / MODEL


def _length(config: TrainingConfig) -> tuple[float, int | None]:
    return config.epochs, config.max_steps


def _with_length(config: TrainingConfig, other: TrainingConfig) -> TrainingConfig:
    return replace(config, epochs=other.epochs, max_steps=other.max_steps)


def _warmup_steps(config: TrainingConfig, source: Source) -> int:
    return math.ceil(config.optimizer.warmup_share * source.num_steps)


def _differences(config: TrainingConfig, done: int, before: Source, now: Source) -> list[str]:
    """How the run differs from one that had its new length from the start, as lines to tell."""
    found = []
    is_flat = config.optimizer.min_learning_rate_share == 1
    if not is_flat or _warmup_steps(config, before) != _warmup_steps(config, now):
        found.append("learning rates")
    if not same_beginning(before, now, done):
        found.append("samples")
    told = f", but with the {' and '.join(found)} of the length before in its first {done} steps" if found else ""
    return [f"going on from step {done}, as a run of {now.num_steps} steps{told}"]


def _starts_raw(config: TrainingConfig) -> bool:
    learns_language = "language_model" in config.train or config.lora is not None
    return learns_language and config.model.start is None and config.model.projector_weights is None


def _arguments(config: TrainingConfig, output: Path) -> TrainingArguments:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    per_step = config.batch_size // config.device_batch_size
    if per_step % world_size:
        raise ValueError(
            f"batch_size={config.batch_size} is {per_step} batches of device_batch_size={config.device_batch_size},"
            f" which {world_size} processes cannot share; choose another size or number"
        )
    _require_trackers(config.report_to)
    has_gpu = torch.cuda.is_available()
    floor = config.optimizer.min_learning_rate_share
    arguments = TrainingArguments(
        use_cpu=not torch.accelerator.is_available(),  # else processes without a GPU would each train alone
        output_dir=str(output / CHECKPOINTS),
        num_train_epochs=1,  # the source holds all epochs, one behind the other
        per_device_train_batch_size=1,
        gradient_accumulation_steps=per_step // world_size,
        lr_scheduler_type="cosine_with_min_lr" if floor else "cosine",
        lr_scheduler_kwargs={"min_lr_rate": floor} if floor else None,
        learning_rate=config.optimizer.learning_rate,
        max_grad_norm=config.optimizer.max_grad_norm,
        bf16=config.precision == "bfloat16",
        **{RECOMPUTATION: config.checkpointing, f"{RECOMPUTATION}_kwargs": {"use_reentrant": False}},
        torch_compile=config.compile,
        logging_nan_inf_filter=False,
        save_steps=config.save_every,
        save_total_limit=None,  # the trainer removes old ones itself, once the new one is whole
        dataloader_num_workers=config.data.num_workers,
        dataloader_prefetch_factor=2 if config.data.num_workers else None,
        dataloader_pin_memory=has_gpu,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        report_to=list(config.report_to) or "none",
        project="tokenpacker",
        run_name=output.resolve().name,
        disable_tqdm=True,
        seed=config.seed,
    )
    if arguments.world_size != world_size:
        raise ValueError(
            f"WORLD_SIZE={world_size} but accelerate made a group of {arguments.world_size}; start the processes with"
            " accelerate launch"
        )
    return arguments


@contextmanager
def _whole_weights(arguments: TrainingArguments) -> Iterator[None]:
    """Lets models load whole: ZeRO-3 would take them apart as they load, and they could be neither joined nor wrapped.

    DeepSpeed takes them apart afterwards. Until then each process holds the whole model in main memory.
    """
    plugin = arguments.deepspeed_plugin
    if plugin is None:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(plugin.dschf)


def _require_trackers(names: tuple[str, ...]) -> None:
    """Raises ImportError for a tracker whose library is missing, before anything is loaded."""
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"report_to names {name!r}, which is unknown; use some of {', '.join(TRACKERS)}, or []")
        if importlib.util.find_spec(name) is None:
            package = "'tokenpacker[train]'" if name == "tensorboard" else name
            raise ImportError(
                f"report_to names {name}, which is not installed; pip install {package}, or --set report_to=[]"
            )


def _run_before(config: TrainingConfig, output: Path) -> TrainingConfig | None:
    """The config that the run in a folder was called with last; None where none has begun.

    Raises:
        ValueError: when it is another run.
    """
    path = output / CONFIG
    begun = (output / MODEL).is_dir() or bool(whole_checkpoints(output / CHECKPOINTS))
    if not begun or not path.is_file():  # a call that failed before its first checkpoint left nothing to mix up
        return None
    try:
        found = from_dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); choose another --output") from None
    before, now = _decisive(found), _decisive(config)
    changed = [key for key, value in before.items() if value != now[key]]
    if changed:
        raise ValueError(f"{output} holds a run with other settings ({', '.join(changed)}); choose another --output")
    return found


def _decisive(config: TrainingConfig) -> dict[str, Any]:
    """The settings that decide what a run computes, by dotted key."""
    content = config.to_dict()
    flat = {key: value for key, value in content.items() if key not in ("data", "model")}
    flat |= {f"{part}.{key}": value for part in ("data", "model") for key, value in content[part].items()}
    return {key: value for key, value in flat.items() if key not in (*MAY_CHANGE, *LENGTH)}


def _require_same_data(config: TrainingConfig, source: Source, output: Path) -> None:
    """Sees that the data are still those that the run began with: a step number says nothing in others."""
    if not _is_as_before(output / DATA, source.fingerprint):
        raise ValueError(
            f"data.path={config.data.path} gives other samples than the run in {output} began with; restore the data"
            " and their images, or choose another --output"
        )


def _fingerprint_of_start(config: TrainingConfig, model: torch.nn.Module) -> str:
    """Of the weights that a run begins with, by some numbers of each; new ones are left out."""
    digest = hashlib.sha256()
    loaded = config.model.start or config.model.projector_weights
    new = ".lora_", "" if loaded else ".multi_modal_projector."
    for name, parameter in model.named_parameters():
        if not any(mark and mark in name for mark in new):
            some = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)]
            digest.update(name.encode() + some.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _require_same_start(fingerprint: str, output: Path) -> None:
    if not _is_as_before(output / START, fingerprint):
        raise ValueError(
            f"the models that the run in {output} began with have changed, or it was begun by version 0.1.0, which"
            " named weights otherwise; give the same, or choose another --output"
        )


def _is_as_before(path: Path, fingerprint: str) -> bool:
    """Whether a run that has checkpoints had this fingerprint."""
    begun = bool(whole_checkpoints(path.parent / CHECKPOINTS)) and path.is_file()
    return not begun or path.read_text(encoding="utf-8") == _digest(fingerprint)


def _digest(fingerprint: str) -> str:
    return json.dumps({"sha256": fingerprint}) + "\n"


def _finish(
    trainer: PartTrainer, processor: Any, config: TrainingConfig, source: Source, output: Path, seconds: float
) -> Path:
    """Writes the finished model, its projector apart, its card and curve; all processes call it."""
    folder, part = output / MODEL, output / f"{MODEL}.part"
    if trainer.args.should_save and part.exists():
        shutil.rmtree(part)
    trainer.accelerator.wait_for_everyone()
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None  # all take part
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")  # else nothing is written
    model = trainer.accelerator.unwrap_model(trainer.model)
    if config.lora is None:
        trainer.save_model(str(part))
    elif trainer.args.should_save:
        model.save_pretrained(output / "adapter", state_dict=weights)
        found = dict(model.named_parameters()) if weights is None else weights
        learned = {name: found[name] for name, p in model.named_parameters() if p.requires_grad}
        with _whole_weights(trainer.args):
            model, weights = merged_model(config, learned), None
        model.save_pretrained(part)
    if trainer.args.should_save:
        (part / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle, and all that it says stands in the config
        processor.save_pretrained(part)
        save_projector(model, output / "projector.safetensors", weights)
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        (output / HISTORY).write_text(json.dumps({"seconds": seconds, "steps": history}) + "\n")
        write_report(part, config, source, history, seconds)
        if folder.exists():
            shutil.rmtree(folder)
        part.replace(folder)  # a model folder is whole or not there
    trainer.accelerator.wait_for_everyone()
    return folder
