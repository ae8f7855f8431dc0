"""Times of named parts of a call, variants that take turns, and the summary of all rounds.

`torch.utils.benchmark.Timer` was tried. It repeats one statement, so variants cannot take turns, the result of a timed
part cannot go on to the next part, and it has no processor time.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from tokenpacker.speed.tables import milliseconds

T = TypeVar("T")


def synchronize(device: torch.device) -> None:
    """Waits for all work on the device; on all GPUs, as a model may be spread over them."""
    if device.type == "cuda":
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)
    elif device.type == "mps":
        torch.mps.synchronize()


class Stopwatch:
    """Wall time and processor time of named parts, in seconds, one entry per call of `time`.

    Args:
        device: synchronized before each reading of the clocks.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.wall: dict[str, list[float]] = defaultdict(list)
        self.cpu: dict[str, list[float]] = defaultdict(list)  # of all threads; other users of the machine add little

    def time(self, part: str, call: Callable[[], T], repeats: int = 1) -> T:
        """Times a call and returns its result. With `repeats` it records the mean of so many calls in a row."""
        synchronize(self.device)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(repeats):
            result = call()
        synchronize(self.device)
        self.cpu[part].append((time.process_time() - cpu) / repeats)
        self.wall[part].append((time.perf_counter() - wall) / repeats)
        return result


def take_turns(variants: Sequence[T], rounds: int) -> Iterator[T]:
    """All variants in every round, so that other load on the machine affects them alike; the first one rotates."""
    for number in range(rounds):
        first = number % len(variants)
        yield from (*variants[first:], *variants[:first])


@dataclass(frozen=True)
class Spread:
    """Median and 95th percentile of several times, in milliseconds."""

    median: float
    p95: float

    @classmethod
    def of(cls, seconds: Sequence[float] | np.ndarray) -> Spread:
        """Summarizes times in seconds; a percentile between two times is interpolated."""
        times = 1000 * np.asarray(seconds)
        return cls(float(np.median(times)), float(np.percentile(times, 95)))

    def __str__(self) -> str:
        """As tables have it: `12.3 (14.0)`."""
        return f"{milliseconds(self.median)} ({milliseconds(self.p95)})"

    def to_dict(self) -> dict[str, float]:
        """A JSON-ready dict."""
        return {"median": round(self.median, 4), "p95": round(self.p95, 4)}
