"""A part of the GPU benchmark while it is measured, and the device's clock and memory."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.side_by_side import MIB, peak_tensor_mib
from tokenpacker.hub import carried_model_path
from tokenpacker.speed.machine import describe_machine
from tokenpacker.speed.memory import PeakMemory
from tokenpacker.speed.model_sizes import Shapes, named_shapes, shapes_of_folder
from tokenpacker.speed.stopwatch import Stopwatch, synchronize, take_turns

SPARE = 5  # seconds before the deadline in which nothing new begins
SPAN_MS = 5.0  # that one timing takes at least, of as many calls as that needs
MOST_CALLS = 50

Call = Callable[[], Any]


@dataclass
class Run:
    """What a part is asked for, and what it found so far, which is in the file at any time."""

    part: str
    device: torch.device
    small: bool
    started: float
    deadline: float
    file: Path
    found: dict[str, Any] = field(default_factory=lambda: {"rows": [], "notes": []})

    @classmethod
    def of(cls, settings: dict[str, Any]) -> Run:
        """From the settings that the command hands to a part's process."""
        run = cls(**settings | {"device": torch.device(settings["device"]), "file": Path(settings["file"])})
        run.found |= {"machine": describe_machine(run.device), "small": run.small}
        run.write()
        return run

    def say(self, text: str) -> None:
        """A line of progress with the time used."""
        print(f"[{time.time() - self.started:5.0f} s] {self.part}: {text}", flush=True)

    def note(self, text: str) -> None:
        """Something that a reader of the page must know."""
        self.say(text)
        self.found["notes"].append(text)
        self.write()

    def attempt(self, what: str, call: Callable[[], dict[str, Any]]) -> bool:
        """Adds the row that the call gives; whether it gave one. A failure is a note, and so is a lack of time."""
        if time.time() > self.deadline - SPARE:
            self.note(f"{what}: not run, the time is spent")
            return False
        self.say(what)
        try:
            self.found["rows"].append(call())
            self.write()
        except Exception as error:  # whatever it is, the next row may do well
            self.failed(what, error)
            return False
        finally:
            self.free()
        return True

    def failed(self, what: str, error: Exception) -> None:
        """A note of what went wrong, its traceback on standard error."""
        traceback.print_exception(error)
        self.note(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")

    def free(self) -> None:
        """Gives back what the row before left."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def write(self) -> None:
        """Brings the file up to date; it is whole at any time, for the process may be killed."""
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.found), encoding="utf-8")
        part.replace(self.file)

    def shapes(self, layers: int | None = None) -> Shapes:
        """CLIP-L/336 and a language model of 7B shape, of so many layers; those of the carried model if small."""
        if self.small:
            return shapes_of_folder(carried_model_path(), "tiny")
        shapes = named_shapes("7b")
        if layers is not None:
            shapes.config.text_config.num_hidden_layers = layers
        return shapes


def time_in_turns(calls: Mapping[str, Call], rounds: int, device: torch.device) -> dict[str, dict[str, list[float]]]:
    """As `side_by_side.time_in_turns`, by CUDA events: `device_ms` of each call in each round.

    The package's stopwatch reads the host's clock, whose synchronization counts beside kernels this short.
    """
    repeats = {}
    for name, call in calls.items():
        _elapsed_ms(call, 2, device)  # warms up
        repeats[name] = max(1, min(MOST_CALLS, round(SPAN_MS / max(_elapsed_ms(call, 3, device), 1e-3))))
    times: dict[str, dict[str, list[float]]] = {name: {"device_ms": []} for name in calls}
    for name in take_turns(list(calls), rounds):
        times[name]["device_ms"].append(_elapsed_ms(calls[name], repeats[name], device))
    return times


def _elapsed_ms(call: Call, repeats: int, device: torch.device) -> float:
    """Milliseconds of a call, the mean of some that follow one another; by CUDA events where there are any."""
    if device.type != "cuda":
        watch = Stopwatch(device)
        watch.start()
        for _ in range(repeats):
            call()
        watch.stop("call", repeats)
        return 1000 * watch.wall["call"][0]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / repeats


def capture(call: Call) -> Call:
    """Replays the call's kernels as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # as torch asks for: the first calls allocate, and would be captured
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def peak_mib(call: Call, device: torch.device) -> float:
    """The most that torch held at once during the call, its result included, above what it held before."""
    if device.type != "cuda":
        return peak_tensor_mib(call)
    memory = PeakMemory(device)
    memory.start()
    before = memory.current
    result = call()
    synchronize(device)
    del result
    return ((memory.stop() or 0) - before) / MIB
