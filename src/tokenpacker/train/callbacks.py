"""What happens around the training steps: a stop on signals, the seconds, the progress bar, repeatable sums."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from tokenpacker.progress import Progress
from tokenpacker.whole_files import write_whole

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ECHO_SECONDS = 1.0  # a scheduler signals the launcher and its processes, and the launcher repeats it to them


class StopOnSignal(TrainerCallback):
    """Within its context, SIGTERM and SIGINT end the run after the current step, with a checkpoint.

    All processes stop after the same step, even if only one got the signal. A second signal ends a process at once.
    The Trainer's `enable_jit_checkpoint` falls short: it handles SIGTERM only, waits three seconds, and the processes
    of a distributed run may save at different steps.
    """

    def __init__(self) -> None:
        self.received_at: float | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        """Takes the signals over."""
        self.before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *error: Any) -> None:
        """Restores the handlers from before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Requests a checkpoint and the end of the training if a signal came."""
        if _any_process(self.received_at is not None):
            control.should_save = control.should_training_stop = True

    def _receive(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.received_at is None:
            self.received_at = now
            print(
                "stopping after this step, with a checkpoint; once more to stop at once, with the last one there is",
                file=sys.stderr,
            )
        elif now - self.received_at > ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


class Stopwatch(TrainerCallback):
    """Seconds of training over all calls of a run, written to the file `path` with each checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.before = float(json.loads(path.read_text())) if path.exists() else 0.0
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return round(self.before + time.monotonic() - self.started, 1)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes the seconds."""
        if args.should_save:
            write_whole(self.path, json.dumps(self.seconds))


class ProgressBar(TrainerCallback):
    """Shows steps, loss and evaluations on standard error.

    transformers' `ProgressCallback` writes carriage returns into log files, and its loss lines to standard output.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.notes: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts at the step that the run continues from."""
        self.progress = Progress(
            self.title, state.max_steps, done=state.global_step, shown=state.is_world_process_zero
        ).start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts the step."""
        self.progress.update(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Shows the loss."""
        if logs and "loss" in logs:
            self.note(loss=f"loss {float(logs['loss']):.3f}")

    def note(self, **notes: str) -> None:
        """Shows texts behind the count; each stays until another of its name replaces it."""
        self.notes |= notes
        self.progress.update(self.progress.done, "; ".join(filter(None, self.notes.values())))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leaves the last count."""
        self.progress.stop()


@contextmanager
def deterministic_on_cpu() -> Iterator[None]:
    """Within its context, the same steps on a CPU give the same bits, with several threads too.

    Otherwise torch adds the gradients of an indexed tensor (such as a tile that occurs three times in a batch) in the
    order in which threads happen to finish. On a GPU this changes nothing. The Trainer's `full_determinism` fails on
    operations without a deterministic form, and fills new memory, which costs time.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if not torch.accelerator.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Nothing here reads memory that was not written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]


def leave_signals_to_parent(then: Callable[[int], None] | None, worker: int) -> None:
    """Starts a process that reads data so that only its parent's SIGTERM ends it.

    A scheduler and Ctrl-C signal all processes, but the current step still needs its batches. A worker whose parent is
    gone ends by itself.

    Args:
        then: the function that the data loader would have called with the worker's number.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS cannot tell who sent a signal: there SIGTERM ends a worker at once
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()
    if then is not None:
        then(worker)


def _obey_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _any_process(flag: bool) -> bool:
    if not torch.distributed.is_initialized():
        return flag
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    value = torch.tensor(float(flag), device=device)
    torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return bool(value)


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """Restores the random numbers of Python, numpy and torch at its end."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    python, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002 - others draw from it
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)  # noqa: NPY002
