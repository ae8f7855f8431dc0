"""Measures the carried models on all test questions and writes the numbers where people read them.

    python -m benchmarks.measure_carried

writes docs/measured.json, the table in README.md, and the accuracies in the models' cards. Takes about ten minutes on
two cores.
"""

from __future__ import annotations

import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch
import transformers

from tokenpacker.evaluate import measure_model
from tokenpacker.hf import carried_model_path
from tokenpacker.train.card import add_accuracies

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ROOT / "docs" / "measured.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
MODELS = ("tiny", "tiny-mlp")


def main() -> None:
    """Measures, then writes everything."""
    rows_of = {name: measure_model(carried_model_path(name)) for name in MODELS}
    measured = {
        "command": "python -m benchmarks.measure_carried",
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "rows": [row for rows in rows_of.values() for row in rows],
    }
    MEASURED.write_text(json.dumps(measured, indent=1) + "\n")
    text = README.read_text(encoding="utf-8")
    block = f"{BEGIN}\n{render(measured)}\n{END}"
    README.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: block, text, flags=re.DOTALL), encoding="utf-8")
    for name, rows in rows_of.items():
        add_accuracies(carried_model_path(name), rows)


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


if __name__ == "__main__":
    main()
