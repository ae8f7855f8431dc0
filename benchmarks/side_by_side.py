"""What the benchmarks of single parts share: variants in turns, medians of pairs, memory, the machine, a table.

A benchmark times its variants one after the other in every round, so that whoever else uses the machine hits them
alike, and compares them round by round: by the wall's clock, and by processor time, which suffers less from others.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

MIB = 1024 * 1024
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes on macOS and KiB on Linux

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
    """Each variant's times in each round, after one call of each to warm up; each round starts with another."""
    names = list(variants)
    for call in variants.values():
        call()
    times: Times = {name: {"wall_ms": [], "cpu_ms": []} for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            wall, cpu = time.perf_counter(), time.process_time()
            variants[name]()
            times[name]["cpu_ms"].append(1000 * (time.process_time() - cpu))
            times[name]["wall_ms"].append(1000 * (time.perf_counter() - wall))
    return times


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
    """How far a call in a process of its own takes the resident memory above what it was before, in MiB.

    To be measured before anything else, so that no freed memory lies ready, and on one thread: it forks.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_send_peak, args=(call, sender))
    process.start()
    peak = receiver.recv()
    process.join()
    return peak / MIB


def _send_peak(call: Call, sender: Connection) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    sender.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * MAXRSS_UNIT)


def machine() -> dict[str, Any]:
    """What it ran on."""
    return {
        "processors": os.cpu_count(),
        "processor": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def report(
    figures: dict[str, Any], head: list[str], rows: list[list[str]], verdicts: list[str], file: Path | None
) -> None:
    """Prints the table, what it was measured on and whether it is as wanted; writes all figures to the file."""
    on = figures["machine"] = machine()
    command = " ".join(["python -m", _module_name(), *sys.argv[1:]])
    figures["command"] = command.replace(str(file), file.name) if file else command  # the folder is nobody's business
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    lines += [
        "",
        f"Machine: {on['processors']} processors ({on['processor']}, {on['instructions']}), {on['threads']} threads,"
        f" load {on['load'][0]} at the end; Python {on['python']}, torch {on['torch']}.",
        "",
        *verdicts,
    ]
    print("\n".join(lines))
    if file:
        file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _module_name() -> str:
    return f"benchmarks.{Path(sys.argv[0]).stem}"
