"""The demo's page: one HTML file with everything in it, readable without network and without JavaScript."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import jinja2
import torch
import transformers

import tokenpacker
from tokenpacker.demo.examples import Example
from tokenpacker.evaluate import TaskResult
from tokenpacker.speed.question import Speed


@dataclass(frozen=True, kw_only=True)
class Row:
    """One setting in a table: what a task cost it, also as a share of the last setting's cost, and how well it did."""

    label: str
    result: TaskResult
    speed: Speed
    relative_tokens: float
    relative_time: float


@dataclass(frozen=True, kw_only=True)
class Table:
    """All settings on one task."""

    name: str
    description: str
    rows: tuple[Row, ...]
    note: str


def make_table(
    name: str, description: str, results: Sequence[TaskResult], speeds: Sequence[Speed], remark: str = ""
) -> Table:
    """The table of one task; costs are set against the last setting, the one that keeps all tokens."""
    rows = tuple(
        Row(
            label=speed.label,
            result=result,
            speed=speed,
            relative_tokens=result.image_tokens / results[-1].image_tokens,
            relative_time=speed.total_ms / speeds[-1].total_ms,
        )
        for result, speed in zip(results, speeds, strict=True)
    )
    note = (
        f"{results[0].score.num_questions:,} questions about {results[0].num_images:,} images, drawn at random."
        " Tokens are means and include separators. Times are medians of"
        f" {speeds[0].num_questions} single questions, the settings taking turns on each image. {remark}"
    )
    return Table(name=name, description=description, rows=rows, note=note.strip())


def describe_machine(model: transformers.PreTrainedModel) -> str:
    """Where and how a model ran, and versions, for a line below measured times."""
    gpu = f"{torch.cuda.get_device_name(model.device)}; " if model.device.type == "cuda" else ""
    dtype = str(model.dtype).removeprefix("torch.")
    return (
        f"{gpu}{_processor_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {dtype},"
        f" {platform.system()}; Python {platform.python_version()}, torch {torch.__version__},"
        f" transformers {transformers.__version__}."
    )


def write_report(
    path: Path,
    *,
    headline: str,
    facts: Sequence[tuple[str, str]],
    examples: Sequence[Example],
    tables: Sequence[Table],
    machine: str,
    seconds: float,
) -> None:
    """Writes the page, and the folders above it where they are missing.

    Args:
        machine: what the times were measured on.
        facts: (value, label) pairs shown large at the top.
        seconds: time the demo took so far.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    source = (files("tokenpacker.demo") / "report.html.jinja").read_text(encoding="utf-8")
    page = environment.from_string(source).render(
        version=tokenpacker.__version__,
        headline=headline,
        facts=facts,
        examples=examples,
        tables=tables,
        machine=machine,
        seconds=seconds,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _processor_name() -> str:
    """The processor's product name where the system tells it, else its architecture."""
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        for line in cpu_info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
