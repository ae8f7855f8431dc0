"""The folder of a run: its lock, its checkpoints, and the records that tell whether a config may continue it.

    config.json   the last config          seconds.json  seconds of training, over all calls
    data.json     digest of the data       checkpoints/  a folder per checkpoint, see `mark_whole`
    start.json    digest of first weights  model/        the finished model
    tasks.json    digest of the questions that an evaluation asks
    history.json  of a finished run: seconds, the log of each step, and the evaluations

Checkpoints are whole or not used. `save_total_limit` and `get_last_checkpoint` of transformers were tried: the first
removes the old checkpoint before the new one is safely on the disk, the second returns a half-written one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tokenpacker.train.config import TrainingConfig, from_dict
from tokenpacker.whole_files import locked, write_whole

CONFIG, DATA, START, TASKS = "config.json", "data.json", "start.json", "tasks.json"
HISTORY, STOPWATCH = "history.json", "seconds.json"
CHECKPOINTS, MODEL, LOCK = "checkpoints", "model", ".lock"
LOCK_SECONDS = 10.0  # processes that read data outlive a killed run by up to five seconds, and hold its lock
COMPLETE = "complete"  # file that is written into a checkpoint last; a checkpoint without it is a leftover
POSITION_FILE = "position.json"  # in a checkpoint: the place in a stream
UNREADABLE = (OSError, RuntimeError, ValueError, TypeError, KeyError, EOFError, UnpicklingError, SafetensorError)

# Settings that may change when a run is called again: where models and data are, and what does not change weights.
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
    "evaluation.batch_size",
    "evaluation.held_out",
    "evaluation.held_out_images",
)
LENGTH = ("epochs", "max_steps", "evaluation.patience")  # may change too: the run then continues to its new length
NESTED = ("data", "model", "evaluation")


class CheckpointError(ValueError):
    """A checkpoint could not be written, is damaged, or does not fit the model."""


class RunFolder:
    """What a folder holds of the run that a config describes.

    Args:
        path: the folder; it need not exist yet.
        config: of the run that is called now.
    """

    def __init__(self, path: Path, config: TrainingConfig) -> None:
        self.path, self.config = path, config
        self.model, self.history, self.checkpoints = path / MODEL, path / HISTORY, path / CHECKPOINTS

    @property
    def has_model(self) -> bool:
        """Whether a run of any length was finished here."""
        return self.model.is_dir() and self.history.is_file()

    @property
    def is_finished(self) -> bool:
        """Whether a run of the config's length was finished here. Raises ValueError if the folder has another run."""
        before = self.before()
        return self.has_model and before is not None and not self.differs_in_length(before)

    def before(self) -> TrainingConfig | None:
        """The config of the last call; None if no run has begun. Raises ValueError if that was another run."""
        path = self.path / CONFIG
        if not path.is_file() or not (self.model.is_dir() or self._has_begun):
            return None  # a call that failed before its first checkpoint left nothing to continue
        try:
            found = from_dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); choose another --output") from None
        now = _decisive(self.config)
        changed = [key for key, value in _decisive(found).items() if value != now[key]]
        if changed:
            raise ValueError(
                f"{self.path} holds a run with other settings ({', '.join(changed)}); choose another --output"
            )
        return found

    def differs_in_length(self, other: TrainingConfig) -> bool:
        """Whether the config has another length than `other`."""
        mine, others = _by_key(self.config), _by_key(other)
        return any(mine[key] != others[key] for key in LENGTH)

    def last_checkpoint(self) -> Path | None:
        """The last whole checkpoint. Raises CheckpointError if it is damaged, ValueError if a finished run has none."""
        checkpoint = next(reversed(whole_checkpoints(self.checkpoints)), None)
        if checkpoint is not None:
            with clear_checkpoint_errors(checkpoint):
                TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        elif self.has_model:
            raise ValueError(
                f"{self.path} has no checkpoint left to go on from; give --start {self.model} and another --output"
            )
        return checkpoint

    def require_same_data(self, fingerprint: str) -> None:
        """Raises ValueError if the run began with other data: a step number would then mean other samples."""
        if not self._is_recorded(DATA, fingerprint):
            held_out = self.config.evaluation.held_out
            also = f" or evaluation.held_out={held_out}" if held_out else ""
            raise ValueError(
                f"data.path={self.config.data.path}{also} gives other samples than the run in {self.path} began with;"
                " restore the data and their images, or choose another --output"
            )

    def require_same_start(self, fingerprint: str) -> None:
        """Raises ValueError if the run began with other weights."""
        if not self._is_recorded(START, fingerprint):
            raise ValueError(
                f"the models that the run in {self.path} began with have changed, or it was begun by version 0.1.0,"
                " which named weights otherwise; give the same, or choose another --output"
            )

    def require_same_tasks(self, fingerprint: str) -> None:
        """Raises ValueError if the run began with other questions: its best so far would mean something else."""
        if not self._is_recorded(TASKS, fingerprint):
            raise ValueError(
                f"evaluation.tasks={', '.join(self.config.evaluation.tasks)} ask other questions than when the run in"
                f" {self.path} began; restore the files and their images, or choose another --output"
            )

    def record(self, data: str, start: str, tasks: str) -> None:
        """Writes config and fingerprints, and removes what killed calls left half-written."""
        self.history.unlink(missing_ok=True)  # a finished run that is continued is no longer finished
        for name, text in ((DATA, data), (START, start), (TASKS, tasks)):
            write_whole(self.path / name, _digest(text))
        write_whole(self.path / CONFIG, self.config.to_json())
        remove_leftovers(self.checkpoints)

    @property
    def _has_begun(self) -> bool:
        return bool(whole_checkpoints(self.checkpoints))

    def _is_recorded(self, name: str, fingerprint: str) -> bool:
        path = self.path / name
        return not (self._has_begun and path.is_file()) or path.read_text(encoding="utf-8") == _digest(fingerprint)


@contextmanager
def only_training(folder: Path) -> Iterator[None]:
    """Keeps other processes from training into a folder.

    Raises:
        ValueError: if another process does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    taken = f"another process trains into {folder}; wait for its end, or choose another folder"
    with locked(folder / LOCK, taken, seconds=LOCK_SECONDS, keep=True):
        yield


def whole_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder that were written to their end, oldest first."""
    found = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE}")]
    found = [path for path in found if path.name.rsplit("-", 1)[1].isdecimal()]  # others were set aside by the user
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps before a checkpoint."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def position_in(checkpoint: Path | None) -> dict[str, Any] | None:
    """The place in a stream that a checkpoint stores; None if it stores none."""
    path = None if checkpoint is None else checkpoint / POSITION_FILE
    return None if path is None or not path.is_file() else json.loads(path.read_text())


@contextmanager
def clear_checkpoint_errors(folder: Path) -> Iterator[None]:
    """Turns errors of reading a checkpoint into a CheckpointError of one line that tells how to go on."""
    try:
        yield
    except (CheckpointError, torch.OutOfMemoryError):
        raise
    except UNREADABLE as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"checkpoint {folder} is damaged ({' '.join(reason[0].split())[:200]}); remove it and call the run again:"
            " it goes on from the checkpoint before, or starts anew"
        ) from error


def remove_leftovers(folder: Path) -> None:
    """Removes checkpoints that a killed run left half-written or half-removed."""
    whole = set(whole_checkpoints(folder))
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if path.is_dir() and path not in whole:
            shutil.rmtree(path)


def remove_checkpoint(folder: Path) -> None:
    """Removes a checkpoint, its mark first, so that a marked checkpoint is always whole."""
    (folder / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def mark_whole(folder: Path) -> None:
    """Marks a checkpoint as whole once its files are on the disk, so that a power cut leaves no marked half."""
    _sync(*folder.rglob("*"), folder)
    (folder / COMPLETE).touch()
    _sync(folder / COMPLETE, folder, folder.parent)


def _sync(*paths: Path) -> None:
    """Waits until files and folders are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _decisive(config: TrainingConfig) -> dict[str, Any]:
    """The settings that decide what a run computes, by dotted key."""
    return {key: value for key, value in _by_key(config).items() if key not in (*MAY_CHANGE, *LENGTH)}


def _by_key(config: TrainingConfig) -> dict[str, Any]:
    """The settings by dotted key."""
    content = config.to_dict()
    flat = {key: value for key, value in content.items() if key not in NESTED}
    return flat | {f"{part}.{key}": value for part in NESTED for key, value in content[part].items()}


def _digest(fingerprint: str) -> str:
    return json.dumps({"sha256": fingerprint}) + "\n"
