"""One phase of training: transformers' Trainer with this package's optimizer, resumed where it was interrupted."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from tokenpacker.progress import Progress
from tokenpacker.train.optimizer import MuonAdamW
from tokenpacker.train.saving import locked

CHECKPOINTS = "checkpoints"
HISTORY = "history.json"
STOPWATCH = "seconds.json"
PREFETCHED_STEPS = 6
MIN_LOGGED = 20  # entries of a log


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast one phase trains. `batch_size` counts items of the phase's data set."""

    num_steps: int
    learning_rate: float
    muon_learning_rate: float
    batch_size: int = 1
    warmup_steps: int = 100
    weight_decay: float = 0.05
    min_learning_rate_ratio: float = 0.02
    log_every: int = 25
    save_every: int = 250
    num_workers: int = 1


class _OrderedTrainer(Trainer):
    """Items are random functions of their index already: shuffling them again would only break exact resumption."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


@contextmanager
def deterministic_on_cpu() -> Iterator[None]:
    """Within the context, the same steps on a CPU give the same bits each time, with several threads too.

    Without it torch adds the gradients of an indexed tensor, such as a tile that occurs three times in a batch, by
    atomic additions of all threads: in the order in which these happen to come. On a GPU it changes nothing.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if not torch.accelerator.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Nothing here reads what was not written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that a kill leaves the old one or the new one, never a half."""
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def log_interval(log_every: int, num_steps: int) -> int:
    """Steps between two entries of a log: fewer than asked for in a short run, so that its loss makes a curve."""
    return max(1, min(log_every, num_steps // MIN_LOGGED))


class Stopwatch(TrainerCallback):
    """Seconds of training, summed over interruptions: written with every checkpoint to the file `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.before = float(json.loads(path.read_text())) if path.exists() else 0.0
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        """So far."""
        return round(self.before + time.monotonic() - self.started, 1)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes them down."""
        if args.should_save:
            write_whole(self.path, json.dumps(self.seconds))


class ProgressBar(TrainerCallback):
    """Steps and loss on standard error, of the main process: standard output stays free for results."""

    def __init__(self, title: str) -> None:
        self.title = title

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins at the step that the run goes on from."""
        self.progress = Progress(
            self.title, state.max_steps, done=state.global_step, shown=state.is_world_process_zero
        ).start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts the step."""
        self.progress.update(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Shows the loss."""
        if logs and "loss" in logs:
            self.progress.update(state.global_step, f"loss {float(logs['loss']):.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leaves the last count."""
        self.progress.stop()


def run_phase(
    model: nn.Module,
    dataset: Dataset[Any],
    schedule: Schedule,
    *,
    phase_dir: Path,
    collate: Callable[[list[Any]], Any],
    seed: int,
) -> None:
    """Trains `model` in place and writes its history (steps, seconds, loss curve) to `phase_dir`.

    Checkpoints stand there too; a phase that was interrupted continues from the last one. Raises ValueError where
    another process trains into the folder.
    """
    arguments = TrainingArguments(
        output_dir=str(phase_dir / CHECKPOINTS),
        max_steps=schedule.num_steps,
        per_device_train_batch_size=schedule.batch_size,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": schedule.min_learning_rate_ratio},
        warmup_steps=min(schedule.warmup_steps, schedule.num_steps // 4),
        max_grad_norm=1.0,
        logging_steps=log_interval(schedule.log_every, schedule.num_steps),
        save_steps=schedule.save_every,
        save_total_limit=1,
        dataloader_num_workers=schedule.num_workers,
        dataloader_prefetch_factor=PREFETCHED_STEPS if schedule.num_workers else None,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    optimizer = MuonAdamW(
        model,
        learning_rate=schedule.learning_rate,
        muon_learning_rate=schedule.muon_learning_rate,
        weight_decay=schedule.weight_decay,
    )
    phase_dir.mkdir(parents=True, exist_ok=True)
    stopwatch = Stopwatch(phase_dir / STOPWATCH)
    trainer = _OrderedTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collate,
        optimizers=(optimizer, None),
        callbacks=[stopwatch, ProgressBar(phase_dir.name)],
    )
    trainer.remove_callback(PrinterCallback)
    with locked(phase_dir), deterministic_on_cpu():
        trainer.train(resume_from_checkpoint=_last_checkpoint(phase_dir))
    curve = [[entry["step"], round(entry["loss"], 4)] for entry in trainer.state.log_history if "loss" in entry]
    history = {"steps": trainer.state.global_step, "seconds": stopwatch.seconds, "loss": curve}
    (phase_dir / HISTORY).write_text(json.dumps(history) + "\n")


def _last_checkpoint(phase_dir: Path) -> str | None:
    folder = phase_dir / CHECKPOINTS
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None
