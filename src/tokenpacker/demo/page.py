"""The demo's page: one HTML file that needs no network and no JavaScript."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import jinja2
from markupsafe import Markup

import tokenpacker
from tokenpacker.demo.examples import Example
from tokenpacker.evaluate import TaskResult
from tokenpacker.speed.question import Speed


@dataclass(frozen=True, kw_only=True)
class Table:
    """Accuracy and cost of all settings on one task. The last setting keeps all tokens; costs are relative to it."""

    name: str
    description: str
    results: Sequence[TaskResult]
    speeds: Sequence[Speed]
    remark: str = ""

    @property
    def rows(self) -> list[tuple[TaskResult, Speed]]:
        """The result and the speed of each setting."""
        return list(zip(self.results, self.speeds, strict=True))

    @property
    def note(self) -> str:
        """How the numbers were measured."""
        return (
            f"{self.results[0].score.num_questions:,} questions about {self.results[0].num_images:,} images, drawn at"
            " random. Tokens are means and include separators. Times are medians of"
            f" {self.speeds[0].num_questions} single questions, the settings taking turns on each image. {self.remark}"
        ).strip()


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
    """Writes the page, and the folders above it if they are missing.

    Args:
        facts: (value, label) pairs, shown large at the top.
        machine: what the times were measured on.
        seconds: how long the demo has run.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    source = (files("tokenpacker.demo") / "report.html.jinja").read_text(encoding="utf-8")
    style = (files("tokenpacker.visualize") / "report.css").read_text(encoding="utf-8")
    page = environment.from_string(source).render(
        style=Markup(style),
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
