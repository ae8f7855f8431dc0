"""Times of named parts of a call, variants that take turns, and the summary of all rounds.

`torch.utils.benchmark.Timer` was tried. It repeats one statement, so variants cannot take turns, the result of a timed
part cannot go on to the next part, and it has no processor time.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")


def synchronize(device: torch.device) -> None:
    """Waits for all work on the device; on all GPUs, as a model may be spread over them."""
    if device.type == "cuda":
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)
    elif device.type == "mps":
        torch.mps.synchronize()


class Stopwatch:
    """Wall time and processor time of named parts, in seconds, one entry per measurement.

    Args:
        device: synchronized before each reading of the clocks.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.wall: dict[str, list[float]] = defaultdict(list)
        self.cpu: dict[str, list[float]] = defaultdict(list)  # of all threads; other users of the machine add little

    def start(self) -> None:
        """Starts the clocks."""
        synchronize(self.device)
        self._started = time.perf_counter(), time.process_time()

    def stop(self, part: str, calls: int = 1) -> None:
        """Records the times since `start`, divided by the number of calls."""
        synchronize(self.device)
        wall, cpu = self._started
        self.wall[part].append((time.perf_counter() - wall) / calls)
        self.cpu[part].append((time.process_time() - cpu) / calls)

    def time(self, part: str, call: Callable[[], T]) -> T:
        """Times a call and returns its result."""
        self.start()
        result = call()
        self.stop(part)
        return result


def take_turns(variants: Sequence[T], rounds: int) -> Iterator[T]:
    """All variants in every round, so that other load on the machine affects them alike; the first one rotates."""
    for number in range(rounds):
        first = number % len(variants)
        yield from (*variants[first:], *variants[:first])


def spread(seconds: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Median and 95th percentile of several times, in milliseconds and JSON-ready."""
    times = 1000 * np.asarray(seconds)
    return {"median": round(float(np.median(times)), 4), "p95": round(float(np.percentile(times, 95)), 4)}
