"""Measures the carried models on all test questions and writes the numbers where people read them.

    python -m benchmarks.measure_carried

writes docs/measured.json, the tables in README.md and docs/regions.md, and the accuracies in the models' cards. Takes
about a quarter of an hour on two idle cores.
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from tokenpacker.carried.card import add_accuracies
from tokenpacker.evaluate import measure_model
from tokenpacker.hf import carried_model_path

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ROOT / "docs" / "measured.json"
README, REGIONS = ROOT / "README.md", ROOT / "docs" / "regions.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
MODELS, REGION_MODEL = ("tiny", "tiny-mlp"), "tiny-regions"


def main() -> None:
    """Measures, then writes everything."""
    rows_of = {name: measure_model(carried_model_path(name)) for name in (*MODELS, REGION_MODEL)}
    measured = {
        "command": "python -m benchmarks.measure_carried",
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "rows": [row for name in MODELS for row in rows_of[name]],
        "region_rows": rows_of[REGION_MODEL],
    }
    MEASURED.write_text(json.dumps(measured, indent=1) + "\n")
    write_tables(measured)
    for name, rows in rows_of.items():
        add_accuracies(carried_model_path(name), rows)


def write_tables(measured: dict[str, Any]) -> None:
    """Puts both tables between the marks of their documents."""
    for document, table in ((README, render(measured)), (REGIONS, render_regions(measured))):
        text = document.read_text(encoding="utf-8")
        before, begin, rest = text.partition(BEGIN)
        _, end, after = rest.partition(END)
        assert end, f"{document} lacks {BEGIN} or {END}"
        document.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")


def render(measured: dict[str, Any]) -> str:
    """The README's table."""
    lines = ["| projector | tokens per tile | task | tokens per image | right / questions | accuracy | 95 % interval |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in measured["rows"]:
        scale_factor = row["scale_factor"]
        projector = "MLP, every token" if scale_factor is None else f"TokenPacker, s = {scale_factor}"
        low, high = row["interval_95"]
        lines.append(
            f"| {projector} | {row['tokens_per_tile']} | {row['task']} | {row['image_tokens']:.0f} |"
            f" {row['correct']:,} / {row['questions']:,} | {100 * row['correct'] / row['questions']:.1f} % |"
            f" {low:.1f} to {high:.1f} |"
        )
    return "\n".join(lines)


def render_regions(measured: dict[str, Any]) -> str:
    """The table of docs/regions.md: the model that takes regions, and in brackets the one that it came from."""
    by_task: dict[str, dict[int, dict[str, Any]]] = {}
    for row in measured["region_rows"]:
        by_task.setdefault(row["task"], {})[row["scale_factor"]] = row
    before = {(row["task"], row["scale_factor"]): row for row in measured["rows"]}
    scale_factors = sorted(next(iter(by_task.values())))
    lines = [f"| task | questions | {' | '.join(f's = {scale}' for scale in scale_factors)} |"]
    lines += ["|---" * (2 + len(scale_factors)) + "|"]
    for task, rows in by_task.items():
        cells = [_percent(rows[scale], before.get((task, scale))) for scale in scale_factors]
        lines.append(f"| `{task}` | {rows[scale_factors[0]]['questions']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(row: dict[str, Any], before: dict[str, Any] | None) -> str:
    share = f"{100 * row['correct'] / row['questions']:.2f}"
    return share if before is None else f"{share} ({100 * before['correct'] / before['questions']:.2f})"


if __name__ == "__main__":
    main()
