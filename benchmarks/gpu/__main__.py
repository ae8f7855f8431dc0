"""Measures on a GPU what a CPU cannot tell, in at most eight minutes, and writes gpu.json and gpu.md.

    python -m benchmarks.gpu                          # on the GPU; into docs/
    python -m benchmarks.gpu --parts training,fsdp2   # these anew, the others stay as they are in docs/
    python -m benchmarks.gpu --device cpu --small     # whether it works, with tiny sizes; into runs/gpu/

It needs nothing but the checkout, torch, transformers and accelerate, and no network. Each part runs in a process of
its own with a limit of time, so that a part that fails or hangs takes no other with it, and is written when it is done.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import ROOT
from benchmarks.gpu.page import write_page
from benchmarks.side_by_side import QUIET

BUDGET = 460  # seconds in all: eight minutes, less what starting and ending take
LEAST = 15  # seconds that a part needs to tell anything


@dataclass(frozen=True)
class Part:
    """A part's limit of time in seconds, and the packages that it cannot do without."""

    seconds: int
    needs: tuple[str, ...] = ()


PARTS = {
    "tests": Part(75, ("pytest",)),
    "model": Part(130),
    "training": Part(80, ("peft",)),
    "projector": Part(150),
    "fsdp2": Part(70),
    "four-bit": Part(40, ("bitsandbytes",)),
}


def main(arguments: list[str] | None = None) -> None:
    """Measures all parts that are asked for, one after the other."""
    options = _options(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    started, file = time.time(), options.output / "gpu.json"
    report: dict[str, Any] = {"parts": {}}
    if options.parts and file.is_file():
        report = json.loads(file.read_text(encoding="utf-8"))
    for name in options.parts or PARTS:
        left = started + options.budget - time.time()
        report["parts"][name] = found = _measured(name, left, started, options)
        _say(started, name, _outcome(found))
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    write_page(report, file.with_suffix(".md"))
    _say(started, "all", f"written to {file} and {file.with_suffix('.md')}")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="(default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="tiny sizes: whether it works, no figures")
    parser.add_argument("--parts", type=_parts, default=(), help=f"some of {','.join(PARTS)} (default: all)")
    budget = "seconds in all; each part has its share (default: %(default)s)"
    parser.add_argument("--budget", type=float, default=BUDGET, help=budget)
    parser.add_argument("--output", type=Path, help="folder (default: docs/; with --small, runs/gpu/)")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device={options.device} is not there: torch sees no GPU; try --device cpu --small")
    if options.device == "cpu" and not options.small:
        parser.error("--device=cpu would take days at full size; add --small")
    options.output = options.output or ROOT / ("runs/gpu" if options.small else "docs")
    return options


def _parts(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"part {unknown[0]!r} is unknown; use some of {','.join(PARTS)}")
    return names


def _measured(name: str, left: float, started: float, options: argparse.Namespace) -> dict[str, Any]:
    """What the part's process found, whatever became of it; or why it was not started."""
    missing = [package for package in PARTS[name].needs if importlib.util.find_spec(package) is None]
    if missing:
        return {"not_run": f"{missing[0]} is not installed"}
    if left < LEAST:
        return {"not_run": f"the {options.budget:g} s were spent"}
    begin, seconds = time.time(), min(left, PARTS[name].seconds * options.budget / BUDGET)
    _say(started, name, f"at most {seconds:.0f} s")
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        settings = {
            "part": name,
            "device": options.device,
            "small": options.small,
            "started": started,
            "deadline": begin + seconds,
            "file": str(result),
        }
        command = [sys.executable, "-m", "benchmarks.gpu.measure", json.dumps(settings)]
        ended = _run(command, seconds)
        found = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {"rows": [], "notes": []}
    if ended:
        found["notes"].append(ended)
    return found | {"seconds": round(time.time() - begin, 1)}


def _run(command: list[str], seconds: float) -> str | None:
    """How the command ended, None when well. All that it started ends with it."""
    paths = [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment |= QUIET | os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        status = process.wait(seconds)
        return f"its process ended with status {status}" if status else None
    except subprocess.TimeoutExpired:
        return f"stopped after its {seconds:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _outcome(found: dict[str, Any]) -> str:
    if "not_run" in found:
        return f"not run: {found['not_run']}"
    return f"{len(found['rows'])} rows in {found['seconds']:.0f} s, {len(found['notes'])} notes"


def _say(started: float, name: str, text: str) -> None:
    print(f"[{time.time() - started:5.0f} s] {name}: {text}", flush=True)


if __name__ == "__main__":
    main()
