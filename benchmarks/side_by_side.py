"""Shared by the benchmarks of single parts: variants in turns, medians of pairs, memory, and a report.

Variants take turns in every round and are compared round by round: by wall time, and by processor time, which other
users of the machine disturb less.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from tokenpacker.speed.machine import describe_machine, machine_text, versions_text
from tokenpacker.speed.memory import PeakMemory
from tokenpacker.speed.stopwatch import Stopwatch, take_turns
from tokenpacker.speed.tables import markdown

MIB = 1024 * 1024

Call = Callable[[], Any]
Times = dict[str, dict[str, list[float]]]  # per variant and clock, one of each round in milliseconds

# Threads that wait for work would otherwise spin, which counts as processor time and disturbs whoever else runs. And
# the profiler would tell of every start.
QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KINETO_LOG_LEVEL": "99"}


@dataclass(frozen=True)
class Target:
    """What a figure should be: `bound` is "at least" or "at most"."""

    figure: str
    bound: str
    value: float

    def verdict(self, reached: float) -> str:
        """One line of a report."""
        met = reached >= self.value if self.bound == "at least" else reached <= self.value
        return f"- {self.figure}: {reached:.3f}, {self.bound} {self.value:.3f} wanted: {'met' if met else 'not met'}"


def arguments(
    program: str,
    description: str,
    rounds: int,
    threads: int | None = None,
    flags: Mapping[str, str] = MappingProxyType({}),
) -> argparse.Namespace:
    """Rounds, threads, the file for all figures and further flags, as the command line gives them; sets the threads.

    Starts the program anew where its libraries were not told to be quiet, which they read before anything else.
    """
    if not QUIET.keys() <= os.environ.keys():
        command = [sys.executable, "-m", f"benchmarks.{program}", *sys.argv[1:]]
        os.execve(sys.executable, command, QUIET | dict(os.environ))
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{program}", description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of each variant (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=threads or torch.get_num_threads(), help="(default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="file for all figures")
    for flag, told in flags.items():
        parser.add_argument(f"--{flag}", action="store_true", help=told)
    parsed = parser.parse_args()
    for name in ("rounds", "threads"):
        if getattr(parsed, name) < 1:
            parser.error(f"--{name}={getattr(parsed, name)} must be at least 1")
    torch.set_num_threads(parsed.threads)
    return parsed


def time_in_turns(variants: Mapping[str, Call], rounds: int) -> Times:
    """Each variant's times in each round, after one call of each to warm up."""
    for call in variants.values():
        call()
    watch = Stopwatch(torch.device("cpu"))
    for name in take_turns(list(variants), rounds):
        watch.time(name, variants[name])
    milliseconds = {clock: _milliseconds(getattr(watch, clock)) for clock in ("wall", "cpu")}
    return {name: {f"{clock}_ms": times[name] for clock, times in milliseconds.items()} for name in variants}


def _milliseconds(times: Mapping[str, list[float]]) -> dict[str, list[float]]:
    return {name: [1000 * seconds for seconds in of] for name, of in times.items()}


def median_ratio(times: Times, numerator: str, denominator: str, clock: str = "wall_ms") -> float:
    """The median over the rounds of one variant's time over another's in the same round."""
    pairs = zip(times[numerator][clock], times[denominator][clock], strict=True)
    return statistics.median(one / other for one, other in pairs)


def peak_tensor_mib(call: Call) -> float:
    """The most that torch held at once of what it allocated during the call, its result included, in MiB.

    Every allocation is counted, exactly; the scratch memory of the libraries below torch is not among them.
    """
    call()  # what is kept between calls is not counted
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    del result
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / MIB


def peak_process_mib(call: Call) -> float:
    """The rise of the resident memory during a call in a process of its own, in MiB.

    Measure it before anything else, so that no freed memory is reused, and on one thread, as it forks.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_send_peak, args=(call, sender))
    process.start()
    peak = receiver.recv()
    process.join()
    return peak / MIB


def _send_peak(call: Call, sender: Connection) -> None:
    memory = PeakMemory(torch.device("cpu"))
    memory.start()
    before = memory.stop() or 0
    call()
    sender.send((memory.stop() or 0) - before)


def report(
    figures: dict[str, Any], head: list[str], rows: list[list[str]], verdicts: list[str], file: Path | None
) -> None:
    """Prints the table, the machine and the verdicts; writes all figures to the file."""
    on = describe_machine(torch.device("cpu"))
    load, instructions = [round(load, 2) for load in os.getloadavg()], torch.backends.cpu.get_cpu_capability()
    figures["machine"] = on | {"instructions": instructions, "load": load}
    command = " ".join(["python -m", _module_name(), *sys.argv[1:]])
    figures["command"] = command.replace(str(file), file.name) if file else command  # the folder is nobody's business
    lines = [
        *markdown(head, rows),
        "",
        f"Machine: {machine_text(on)} ({instructions}), load {load[0]} at the end; {versions_text(on)}.",
        "",
        *verdicts,
    ]
    print("\n".join(lines))
    if file:
        file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _module_name() -> str:
    return f"benchmarks.{Path(sys.argv[0]).stem}"
