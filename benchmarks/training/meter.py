"""Time and memory of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tokenpacker.speed.memory import PeakMemory
from tokenpacker.speed.stopwatch import Stopwatch

MIB = 1024 * 1024


def device() -> torch.device:
    """Where the model runs: a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast() -> torch.autocast:
    """What the forward pass runs under: bfloat16 on a GPU, nothing on a CPU, as the package's trainer is told too."""
    return torch.autocast(device().type, torch.bfloat16, enabled=torch.cuda.is_available())


class Meter:
    """Wall time, processor time and peak memory of a run, in seconds and bytes.

    On a GPU the memory is that of torch's allocator, on a CPU the process's resident memory.

    Args:
        model: memory in use with the model built.
        state: memory that gradients and AdamW's moments need above it, in any variant.
        losses: of the steps.
    """

    def __init__(self) -> None:
        self.watch, self.memory = Stopwatch(device()), PeakMemory(device())
        self.model = self.state = 0
        self.losses: list[float] = []

    def model_built(self, model: nn.Module) -> None:
        """Notes the memory in use before anything is computed."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.state = 3 * sum(parameter.numel() * parameter.element_size() for parameter in trained)
        self.memory.start()
        self.model = self.memory.current

    def warm_up(self, model: nn.Module, loss: Callable[[], Tensor]) -> None:
        """One pass forward and back, so that no variant pays for one-time work of torch."""
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
        self.watch.start()

    def stop(self) -> None:
        """Stops the clocks."""
        self.watch.stop("run")

    def result(self) -> dict[str, Any]:
        """Everything as plain values, memory in MiB."""
        peak = self.memory.stop() or self.memory.current
        return {
            "seconds": self.watch.wall["run"][-1],
            "cpu_seconds": self.watch.cpu["run"][-1],
            "peak_mib": peak / MIB,
            "model_mib": self.model / MIB,
            "above_model_mib": (peak - self.model) / MIB,
            "gradients_and_moments_mib": self.state / MIB,
            "mean_loss": sum(self.losses) / len(self.losses),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        }
