"""Time and memory of one run."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor, nn

MIB = 1024 * 1024
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes on macOS and KiB on Linux


def device() -> torch.device:
    """Where the model runs: a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast() -> torch.autocast:
    """What the forward pass runs under: bfloat16 on a GPU, nothing on a CPU, as the package's trainer is told too."""
    return torch.autocast(device().type, torch.bfloat16, enabled=torch.cuda.is_available())


@dataclass
class Meter:
    """Wall time, processor time and peak memory of a run.

    On a GPU the memory is that of torch's allocator, and clocks are read once the device is done. On a CPU it is the
    process's resident memory. All in seconds and bytes.

    Args:
        seconds: of wall time.
        cpu_seconds: of all threads together, which other users of the machine disturb less.
        model: memory in use with the model built.
        state: what of the memory above it gradients and AdamW's moments need, in any variant.
        losses: of the steps.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    model: int = 0
    state: int = 0
    losses: list[float] = field(default_factory=list)

    def model_built(self, model: nn.Module) -> None:
        """Takes down the memory that is in use before anything was computed."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.state = 3 * sum(parameter.numel() * parameter.element_size() for parameter in trained)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.model = torch.cuda.memory_allocated()
        else:
            self.model = psutil.Process().memory_info().rss

    def warm_up(self, model: nn.Module, loss: Callable[[], Tensor]) -> None:
        """One pass forward and back, so that no variant pays for what torch does but once."""
        with autocast():
            value = loss()
        value.backward()
        model.zero_grad()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measures what is done within."""
        self.start()
        yield
        self.stop()

    def start(self) -> None:
        """Starts the clocks."""
        _finish_device()
        self.seconds, self.cpu_seconds = -time.perf_counter(), -time.process_time()

    def stop(self) -> None:
        """Stops the clocks."""
        _finish_device()
        self.seconds += time.perf_counter()
        self.cpu_seconds += time.process_time()

    def result(self) -> dict[str, Any]:
        """Everything as plain values, memory in MiB."""
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT
        return {
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "peak_mib": peak / MIB,
            "model_mib": self.model / MIB,
            "above_model_mib": (peak - self.model) / MIB,
            "gradients_and_moments_mib": self.state / MIB,
            "mean_loss": sum(self.losses) / len(self.losses),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        }


def _finish_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
