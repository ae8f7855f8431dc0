"""SIGTERM and SIGINT end a run after the step at hand, with a checkpoint; a second one ends it at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A scheduler signals the launcher and its processes, and the launcher passes it on: one wish arrives several times.
ECHO_SECONDS = 1.0


class StopOnSignal(TrainerCallback):
    """Stops all processes after the step in which one of them got a signal; use it around the training."""

    def __init__(self) -> None:
        self.received_at: float | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        """Takes the signals over."""
        self.before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *error: Any) -> None:
        """Gives the signals back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks for a checkpoint and the end where a signal came."""
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


def leave_signals_to_parent(then: Callable[[int], None] | None, worker: int) -> None:
    """Starts a process that reads data so that only its parent's SIGTERM ends it.

    A scheduler and Ctrl-C signal all processes; the step at hand still needs its batches. Without its parent a worker
    ends by itself.
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
