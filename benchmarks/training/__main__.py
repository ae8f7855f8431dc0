"""Compares training speed and peak memory: this package packed, this package padded, and a plain LLaVA-style loop.

    python -m benchmarks.training [--rounds N] [--samples N] [--json FILE] [--quick]

prints a Markdown table, and writes all figures to FILE. With its defaults it takes ten to twenty minutes on two cores,
depending on who else uses them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.training.data import NUM_KINDS, write_samples
from benchmarks.training.settings import TILE_SIZE, VARIANTS, Settings

ROOT = Path(__file__).resolve().parents[2]
NAMES = {
    "packed": "this package, packed",
    "grouped": "this package, padded, grouped by kind and length",
    "plain": "plain loop, padded, random order",
}
# Threads that wait for work would otherwise spin, and take the processor from whoever else runs.
QUIET_THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
# What packed should be of the plain loop: by wall time and, as others may use the machine, by processor time.
TARGETS = {
    "samples_per_second": ("at least", 1.8),
    "samples_per_cpu_second": ("at least", 1.8),
    "above_model_mib": ("at most", 0.6),
    "peak_mib": ("at most", 0.6),
}
MEASURED = """\
One pass over the same samples in every variant: the same tokens learned in the same number of optimizer steps, so as \
many samples in each on average, all of a step in one batch. Reading and cutting images, forward, backward, clipping \
and AdamW for projector and language model; vision tower frozen, torch's attention (sdpa), no gradient checkpointing, \
float32 on a CPU, bfloat16 autocast on a GPU. Each run is a process of its own; variants take turns, and each round \
draws another order of the samples. Time starts after the model is built and one pass forward and backward. Memory on \
a CPU is the most resident memory the process ever had (ru_maxrss), and how far this lies above its resident memory \
with the model built, so with gradients and AdamW's moments; on a GPU both are torch's allocated memory. Medians over \
the rounds, in brackets least and greatest."""


def main() -> None:
    """Runs all variants and prints the comparison."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="runs of each variant (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=Settings.num_samples, help="in each run (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--quick", action="store_true", help="a tiny model and one round: whether it works, no figures")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds={arguments.rounds} must be at least 1")
    whole = NUM_KINDS * Settings.samples_per_step  # each kind fills its batches, so grouping takes no more steps
    if arguments.samples < 1 or arguments.samples % whole:
        parser.error(f"--samples={arguments.samples} must be a multiple of {whole}")
    settings = Settings(num_samples=arguments.samples, small=arguments.quick)
    figures = measure(settings, 1 if arguments.quick else arguments.rounds)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(render(figures))


def measure(settings: Settings, rounds: int) -> dict[str, Any]:
    """All figures: of every run, their medians, and what they were measured on."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kinds = write_samples(folder, settings.num_samples, TILE_SIZE, seed=0)
        runs = []
        for number in range(rounds):
            turns = VARIANTS[number % len(VARIANTS) :] + VARIANTS[: number % len(VARIANTS)]
            for variant in turns:
                run = Settings(**asdict(settings) | {"variant": variant, "seed": number})
                runs.append(run_variant(run, folder))
                print(f"round {number + 1} of {rounds}, {variant}: {runs[-1]['seconds']:.1f} s", file=sys.stderr)
    return {
        "command": " ".join(["python -m benchmarks.training", *sys.argv[1:]]),
        "measured": MEASURED,
        "settings": asdict(settings) | {"vision": settings.vision_config, "language": settings.text_config},
        "samples_of_each_kind": kinds,
        "machine": machine(runs),
        "variants": {variant: summary([run for run in runs if run["variant"] == variant]) for variant in VARIANTS},
        "runs": runs,
    }


def run_variant(settings: Settings, folder: Path) -> dict[str, Any]:
    """The figures of one run, in a process of its own, with the machine's load before it."""
    # This process imports no torch, so that all memory is left to the variant.
    load = os.getloadavg()[0]
    result = folder / "result.json"
    environment = {"CUDA_VISIBLE_DEVICES": "0", "TOKENIZERS_PARALLELISM": "false", **QUIET_THREADS, **os.environ}
    command = [sys.executable, "-m", "benchmarks.training.variant", json.dumps(asdict(settings)), str(folder)]
    done = subprocess.run([*command, str(result)], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"variant {settings.variant} failed:\n{done.stderr}")
    figures = json.loads(result.read_text(encoding="utf-8"))
    rates = {
        "samples_per_second": figures["samples"] / figures["seconds"],
        "samples_per_cpu_second": figures["samples"] / figures["cpu_seconds"],
    }
    return {"variant": settings.variant, "seed": settings.seed, "load_before": load} | rates | figures


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median, least and greatest of each figure over a variant's runs."""
    numbers = [key for key, value in runs[0].items() if isinstance(value, (int, float)) and key != "seed"]
    values = {key: [run[key] for run in runs] for key in numbers}
    return {key: {"median": statistics.median(of), "range": [min(of), max(of)]} for key, of in values.items()}


def machine(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What it ran on, and how busy that was: load averages, ours included."""
    return {
        "device": runs[0]["device"],
        "processors": os.cpu_count(),
        "processor": platform.machine(),
        "threads": runs[0]["threads"],
        "python": platform.python_version(),
        "torch": runs[0]["torch"],
        "transformers": version("transformers"),
        "load_before_runs": [round(run["load_before"], 2) for run in runs],
    }


def ratio(figures: dict[str, Any], variant: str, key: str) -> float:
    """A variant's median over the plain loop's."""
    return figures["variants"][variant][key]["median"] / figures["variants"]["plain"][key]["median"]


def render(figures: dict[str, Any]) -> str:
    """The comparison as Markdown."""
    columns = ("samples / s", "samples / CPU s", "MiB above the model", "peak MiB")
    head = ["variant", *(name for column in columns for name in (column, "to plain")), "steps", "places filled"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for variant in VARIANTS:
        cells = [NAMES[variant]]
        for key in TARGETS:
            digits = 0 if key.endswith("mib") else 2
            median, (least, most) = figures["variants"][variant][key].values()
            cells += [f"{median:,.{digits}f} ({least:,.{digits}f} to {most:,.{digits}f})"]
            cells += [f"{ratio(figures, variant, key):.2f} x"]
        steps, fill = (figures["variants"][variant][key]["median"] for key in ("steps", "fill"))
        lines.append(f"| {' | '.join([*cells, f'{steps:.0f}', f'{100 * fill:.0f} %'])} |")
    verdicts = [] if figures["settings"]["small"] else ["", *_verdicts(figures)]  # the targets are for the larger model
    return "\n".join([*lines, "", *_notes(figures), *verdicts])


def _notes(figures: dict[str, Any]) -> list[str]:
    on, run = figures["machine"], figures["runs"][0]
    loads = on["load_before_runs"]
    got = {
        variant: [run["cpu_seconds"] / run["seconds"] for run in figures["runs"] if run["variant"] == variant]
        for variant in VARIANTS
    }
    shares = ", ".join(f"{variant} {min(of):.2f} to {max(of):.2f}" for variant, of in got.items())
    kinds = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in figures["samples_of_each_kind"].items())
    return [
        figures["measured"],
        "",
        f"Data: {kinds}; {run['tokens']:,} tokens, the longest sample {run['longest']}, {run['learned_tokens']:,}"
        f" learned, {run['tiles']} tiles. Gradients and moments are {run['gradients_and_moments_mib']:,.0f} MiB in"
        " every variant.",
        "",
        f"Machine: {on['device']}, {on['processors']} processors ({on['processor']}), {on['threads']} threads, load"
        f" {min(loads):.1f} to {max(loads):.1f} before the runs; Python {on['python']}, torch {on['torch']},"
        f" transformers {on['transformers']}.",
        "",
        f"Processor seconds in a second of each variant's run: {shares}. Work on one thread lowers them, and so"
        " do others who use the machine; samples per CPU second are free of the latter's waiting.",
    ]


def _verdicts(figures: dict[str, Any]) -> list[str]:
    lines = []
    for key, (bound, target) in TARGETS.items():
        reached = ratio(figures, "packed", key)
        met = reached >= target if bound == "at least" else reached <= target
        lines.append(f"- packed, {key}: {reached:.2f} x plain, {bound} {target} wanted: {'met' if met else 'not met'}")
    return lines


if __name__ == "__main__":
    main()
