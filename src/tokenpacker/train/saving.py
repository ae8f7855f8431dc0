"""Checkpoints of a run: whole or not at all, and what is wrong with a damaged one."""

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
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

LOCK = ".lock"
LOCK_SECONDS = 10.0  # processes that read data outlive a killed run by up to five seconds, and hold its lock
COMPLETE = "complete"  # written into a checkpoint last: one without it is a leftover
POSITION_FILE = "position.json"  # of a stream, in a checkpoint
UNREADABLE = (OSError, RuntimeError, ValueError, TypeError, KeyError, EOFError, UnpicklingError, SafetensorError)


class CheckpointError(ValueError):
    """A checkpoint could not be written or does not fit the model."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from training into a folder. The system takes the lock of a process that dies.

    Raises:
        ValueError: when another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise ValueError(f"another process trains into {folder}; wait for its end, or choose another folder") from None
    try:
        yield
    finally:
        lock.release()


def whole_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder that were written to their end, oldest first."""
    found = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE}")]
    found = [path for path in found if path.name.rsplit("-", 1)[1].isdecimal()]  # not one that the user set aside
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """How many steps a checkpoint has gone."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def check_state(checkpoint: Path) -> None:
    """Raises CheckpointError where a checkpoint does not tell its step."""
    with clear_checkpoint_errors(checkpoint):
        TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


def require_files(checkpoint: Path, *names: str) -> None:
    """Raises FileNotFoundError for files that a checkpoint lacks."""
    for name in names:
        if not (checkpoint / name).is_file():
            raise FileNotFoundError(f"{name} is missing")


@contextmanager
def clear_checkpoint_errors(folder: Path) -> Iterator[None]:
    """Errors of reading a checkpoint in one line, which says how to go on."""
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


def position_in(checkpoint: Path | None) -> dict[str, Any] | None:
    """The place in a stream that a checkpoint kept; None where there is none."""
    path = None if checkpoint is None else checkpoint / POSITION_FILE
    return None if path is None or not path.is_file() else json.loads(path.read_text())


def remove_leftovers(folder: Path) -> None:
    """Removes checkpoints that a killed run did not finish, writing or removing them."""
    whole = set(whole_checkpoints(folder))
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if path.is_dir() and path not in whole:
            shutil.rmtree(path)


def remove_checkpoint(folder: Path) -> None:
    """Removes a checkpoint, its mark first: at no moment is there a mark on a part of one."""
    (folder / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def mark_whole(folder: Path) -> None:
    """Marks a checkpoint once its files are on the disk, so that no power cut leaves a marked one half-written."""
    sync(*folder.rglob("*"), folder)
    (folder / COMPLETE).touch()
    sync(folder / COMPLETE, folder, folder.parent)


def sync(*paths: Path) -> None:
    """Waits until files and folders are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
