"""The server under load, and what an image costs it at 36, 64, 144 and 576 tokens.

    python -m benchmarks.serving --json docs/serving-benchmark.json --vllm .venvs/vllm/bin/tokenpacker

**Load** (`serving_load`): 200 clients send 2,000 requests about images of many sizes to the carried model; 5 % leave
before their answer is complete, 5 % send something broken. Every good request must get the answer that `generate`
gives for it alone. Other requests of the same kinds warm the server up, until 500 of them take less than 2 % more
memory than the 500 before. They fill the embedded engine's cache of packed tokens, but not vLLM's cache of processed
images, of 4 GiB. Memory is the highest value of the run over the highest of the last of these. Then one client sends
the first 200 good ones to a fresh server, one by one. The answers are a word or two. `--answers long` asks for
descriptions of up to 64 tokens; their offline answers alone take half an hour.

**Tokens** (`serving_tokens`): a model of random weights with CLIP-L/336's patch grid gives answers of 64 tokens at four
scale factors, to one client and to sixteen. Every request has an image of its own, so that no cache helps.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.serving_load import make_requests, measure_load
from benchmarks.serving_tokens import TOGETHER, measure_tokens, save_random_model
from tokenpacker.hf import carried_model_path
from tokenpacker.speed.machine import describe_machine, machine_text, versions_text
from tokenpacker.speed.tables import markdown


def main() -> None:
    """Runs the parts asked for and prints their tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5, help="of the part about tokens")
    parser.add_argument("--vllm", metavar="PROGRAM", help="the program `tokenpacker` of an environment with vLLM")
    parser.add_argument("--engines", nargs="+", choices=("embedded", "vllm"), default=("embedded", "vllm"))
    parser.add_argument("--answers", choices=("short", "long"), default="short")
    parser.add_argument("--skip", choices=("load", "tokens"), default=None)
    parser.add_argument("--json", type=Path, help="file for all figures")
    asked = parser.parse_args()
    engines = {"embedded": [sys.executable, "-m", "tokenpacker"]} | ({"vllm": [asked.vllm]} if asked.vllm else {})
    engines = {name: program for name, program in engines.items() if name in asked.engines}
    figures: dict[str, Any] = {"machine": describe_machine(torch.device("cpu")), "load": [], "tokens": []}
    if asked.skip != "load":
        requests = make_requests(asked.requests, carried_model_path(), asked.answers)
        for name, program in engines.items():
            figures["load"].append(measure_load(program, name, requests, asked.clients, asked.answers))
            _write(figures, asked.json)
    if asked.skip != "tokens":
        with tempfile.TemporaryDirectory() as folder:
            save_random_model(Path(folder))
            for name, program in engines.items():
                figures["tokens"] += measure_tokens(program, name, Path(folder), asked.rounds)
                _write(figures, asked.json)
    print("\n".join(tables(figures)))


def _write(figures: dict[str, Any], file: Path | None) -> None:
    if file:
        file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def tables(figures: dict[str, Any]) -> list[str]:
    """The figures as two Markdown tables."""
    lines = []
    if figures["load"]:
        names = {
            "answers": "answers",
            "good": "good requests",
            "good_equal": "equal to `generate`",
            "left": "clients that left",
            "bad": "broken requests",
            "good_per_second": "good answers a second",
            "good_per_second_one_by_one": "one by one",
            "throughput_ratio": "ratio",
            "median_first_token_s": "seconds to the first token",
            "memory_growth": "memory",
            "client_cores": "cores of the clients",
        }
        names = {name: shown for name, shown in names.items() if all(name in row for row in figures["load"])}
        rows = [[row["engine"], *(_shown(name, row[name]) for name in names)] for row in figures["load"]]
        lines += [*markdown(["engine", *names.values()], rows), ""]
    if figures["tokens"]:
        many = f"tokens/s, {TOGETHER} clients"
        head = ["engine", "tokens an image", "first token, ms", "per token, ms", "tokens/s, 1 client", many, "ratio"]
        rows = [
            [
                row["engine"],
                str(row["packed_tokens"]),
                f"{row['first_token_ms']:.0f}",
                f"{row['per_token_ms']:.1f}",
                f"{row['tokens_per_second_1_client']:.1f}",
                f"{row[f'tokens_per_second_{TOGETHER}_clients']:.1f}",
                f"{row['throughput_ratio']:.2f}",
            ]
            for row in figures["tokens"]
        ]
        lines += [*markdown(head, rows), ""]
    on = figures["machine"]
    return [*lines, f"Machine: {machine_text(on)}; {versions_text(on)}."]


def _shown(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if name.startswith("memory_growth"):
        return f"{value:+.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"


if __name__ == "__main__":
    main()
