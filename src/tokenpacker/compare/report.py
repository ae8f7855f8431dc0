"""The report on a results file: compare.json, compare.md, compare.png, and the tables in documents.

    python -m tokenpacker.compare.report docs/comparison docs/comparison.md

writes the three files beside `results.jsonl`, and the tables between the marks of the named documents. All numbers come
from the rows. With `--mark NAME` the marks are those of another comparison in the same document.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenpacker.compare.figure import Point, draw_figure
from tokenpacker.compare.intervals import Mean
from tokenpacker.compare.marked_tables import BEGIN, put_tables
from tokenpacker.compare.results import RESULTS, RUN, SPEED, Row, latest, of_one_protocol, read_rows
from tokenpacker.compare.runs import STAGES
from tokenpacker.compare.tiles import HD, ONE_TILE
from tokenpacker.speed.machine import machine_text
from tokenpacker.speed.tables import UNKNOWN, markdown, milliseconds, number

JSON_FILE, TABLE_FILE, FIGURE_FILE = "compare.json", "compare.md", "compare.png"
MARK, DIFFERENCES, LOSSES = "compare", "{}-differences", "{}-losses"  # marks of the tables in documents
REFERENCE, FULL = "token-packer", "mlp"  # the projectors from which differences are taken
QUICK_NOTE = "**Quick run: too few steps and questions to compare anything. It shows that everything runs.**"
# Columns of accuracy: heading, task, mode. Pictures of easy-VQA are one tile in both modes.
ACCURACIES = (
    ("easy-VQA", "easy-vqa", ONE_TILE),
    ("fine print, HD", "fine-print", HD),
    ("fine print, one tile", "fine-print", ONE_TILE),
)
MODE_NAMES = {ONE_TILE: "one tile", HD: "HD"}
GIGA = 10**9


@dataclass(frozen=True)
class Group:
    """A projector at a scale factor: its runs, one per seed, and its times by mode."""

    runs: tuple[Row, ...]
    speed: dict[str, dict[str, Any]]

    @property
    def name(self) -> str:
        """The projector's name."""
        return self.runs[0]["projector"]

    @property
    def tokens(self) -> int:
        """Tokens of a tile."""
        return self.runs[0]["tokens_per_tile"]

    def accuracy(self, task: str, mode: str) -> Mean | None:
        """The mean in percent over seeds; None where the task was not asked."""
        percents = self._percents(task, mode)
        return Mean.of(list(percents.values())) if percents else None

    def difference(self, other: Group, task: str, mode: str) -> Mean | None:
        """The mean difference in percentage points, seed by seed, as runs of a seed have seen the same pictures."""
        ours, others = self._percents(task, mode), other._percents(task, mode)
        points = [ours[seed] - others[seed] for seed in ours if seed in others]
        return Mean.of(points) if points else None

    def _percents(self, task: str, mode: str) -> dict[int, float]:
        """Accuracies by seed."""
        scores = {row["seed"]: row["scores"][task][mode] for row in self.runs if task in row["scores"]}
        return {seed: 100 * score["correct"] / score["questions"] for seed, score in scores.items()}

    def loss(self, stage: str) -> Mean:
        """The mean of the last loss over seeds."""
        return Mean.of([row["losses"][stage] for row in self.runs])

    def first_token(self, mode: str) -> float | None:
        """Median time to the first token in milliseconds."""
        return self.speed[mode]["milliseconds"]["first_token"]["median"] if mode in self.speed else None

    def multiplications(self, mode: str) -> int | None:
        """Multiplications of vision, projector and prefill together."""
        return sum(self.speed[mode]["multiplications"].values()) if mode in self.speed else None


class Report:
    """All results in rows of one protocol. Raises ValueError if there is no run."""

    def __init__(self, rows: list[Row]):
        self.runs = list(latest(rows, RUN).values())
        if not self.runs:
            raise ValueError("there is no row of a finished run; let tokenpacker compare finish one")
        self.speed = next(reversed(latest(rows, SPEED).values()), None)
        self.is_quick = any(row["quick"] for row in self.runs)
        asked = {task for row in self.runs for task in row["scores"]}
        self.accuracies = [entry for entry in ACCURACIES if entry[1] in asked]

    @cached_property
    def groups(self) -> list[Group]:
        """All groups, those with the most tokens first, then by name."""
        runs: dict[tuple[str, int], list[Row]] = {}
        for row in sorted(self.runs, key=lambda row: row["seed"]):
            runs.setdefault((row["projector"], row["scale_factor"]), []).append(row)
        speed: dict[tuple[str, int], dict[str, Any]] = {}
        for entry in self.speed["rows"] if self.speed else ():
            speed.setdefault((entry["projector"], entry["scale_factor"]), {})[entry["mode"]] = entry
        groups = [Group(tuple(members), speed.get(key, {})) for key, members in runs.items()]
        return sorted(groups, key=lambda group: (-group.tokens, group.name))

    @property
    def modes(self) -> list[str]:
        """The modes in which times were measured."""
        return [mode for mode in (ONE_TILE, HD) if any(mode in group.speed for group in self.groups)]

    def to_markdown(self) -> str:
        """The table, its legend, and its origin."""
        lines = [QUICK_NOTE, ""] if self.is_quick else []
        return "\n".join([*lines, *self._table(), "", self._legend(), "", self._origin()])

    def differences(self, name: str = REFERENCE) -> str:
        """The table of differences from a projector with as many tokens; empty if there are none.

        For `FULL`, which keeps all tokens, the number of tokens does not matter.
        """
        rows = []
        references = {group.tokens: group for group in self.groups if group.name == name}
        full = next(iter(references.values()), None) if name == FULL else None
        for group in self.groups:
            reference = full or references.get(group.tokens)
            if reference is None or group is reference:
                continue
            means = [group.difference(reference, task, mode) for _, task, mode in self.accuracies]
            rows.append(
                [group.name, number(group.tokens), *(UNKNOWN if m is None else m.text(sign="+") for m in means)]
            )
        header = ["projector", "tokens", *(heading for heading, *_ in self.accuracies)]
        return "\n".join(markdown(header, rows)) if rows and self.accuracies else ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the table's numbers unrounded, and their rows."""
        return {
            "quick": self.is_quick,
            "protocol": self.runs[0]["protocol"],
            "groups": [self._group(group) for group in self.groups],
            "runs": self.runs,
            "speed": self.speed,
        }

    def _group(self, group: Group) -> dict[str, Any]:
        first = group.runs[0]
        return {
            "projector": group.name,
            "scale_factor": first["scale_factor"],
            "tokens_per_tile": group.tokens,
            "parameters": first["parameters"],
            "seeds": [row["seed"] for row in group.runs],
            "accuracy_percent": {
                task: {mode: _plain(group.accuracy(task, mode)) for mode in modes}
                for task, modes in first["scores"].items()
            },
            "last_loss": {stage: _plain(group.loss(stage)) for stage in STAGES},
            "speed": group.speed,
        }

    def points(self, task: str, mode: str) -> list[Point]:
        """One mark for each group whose accuracy and time are known."""
        points = []
        for group in self.groups:
            accuracy, time = group.accuracy(task, mode), group.first_token(mode)
            if accuracy is not None and time is not None:
                points.append(Point(group.name, group.tokens, time, accuracy.mean, accuracy.half))
        return points

    def _table(self) -> list[str]:
        header = ["projector", "tokens", *(heading for heading, *_ in self.accuracies)]
        header += [] if self.accuracies else ["loss, stage 1", "loss, stage 2"]
        header += ["parameters", *(f"{unit}, {MODE_NAMES[mode]}" for unit in ("G mult.", "ms") for mode in self.modes)]
        rows = []
        for group in self.groups:
            accuracies = [group.accuracy(task, mode) for _, task, mode in self.accuracies]
            counts = [group.multiplications(mode) for mode in self.modes]
            rows.append(
                [
                    group.name,
                    number(group.tokens),
                    *(UNKNOWN if accuracy is None else accuracy.text() for accuracy in accuracies),
                    *(group.loss(stage).text(3) for stage in STAGES if not self.accuracies),
                    number(group.runs[0]["parameters"]),
                    *(UNKNOWN if count is None else f"{count / GIGA:.2f}" for count in counts),
                    *(milliseconds(group.first_token(mode)) for mode in self.modes),
                ]
            )
        return markdown(header, rows)

    def _legend(self) -> str:
        seeds = sorted({row["seed"] for row in self.runs})
        missing = [
            f"{group.name} at {group.tokens} tokens has {len(group.runs)}"
            for group in self.groups
            if len(group.runs) < len(seeds)
        ]
        text = f"Seed {seeds[0]} alone, so no interval."
        if len(seeds) > 1:
            text = f"Seeds {', '.join(map(str, seeds))}: mean and 95 % interval over them (Student's t)."
        if missing:
            text += f" Not all are finished: {', '.join(missing)}."
        if self.accuracies:
            scores = self.runs[-1]["scores"]
            counted = ", ".join(f"{task} {scores[task][ONE_TILE]['questions']:,}" for task in scores)
            text += " Accuracy in percent, exact match of free answers."
            text += f" Questions: {counted}; images of easy-VQA are one tile with HD and without."
        text += " Tokens: of one tile. Parameters: the projector's."
        if self.modes:
            text += " G mult. and ms: multiplications in 10^9 and time to the first token in milliseconds (median),"
            text += " vision tower, projector and prefill together, batch 1."
        return text

    def _origin(self) -> str:
        last, speed = self.runs[-1], self.speed
        machines = sorted({_process_text(row) for row in self.runs})
        dates = sorted({row["date"][:10] for row in self.runs})
        minutes = statistics.mean(row["seconds"]["all"] for row in self.runs) / 60
        text = (
            f"`{last['command']}`: {' + '.join(last['recipe'])}, {last['steps']['align']:,} +"
            f" {last['steps']['instruct']:,} steps, {len(self.runs)} runs of {minutes:.1f} minutes on average,"
            f" {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, {'; '.join(machines)}."
        )
        if speed is not None:
            text += f" Times: {speed['rounds']} rounds, {speed['date'][:10]}, {_process_text(speed)}."
        return text


def write_report(folder: Path, rows: list[Row]) -> Report:
    """Writes the three files from rows of one protocol. Raises ValueError if there is no run."""
    report = Report(rows)
    (folder / JSON_FILE).write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    (folder / TABLE_FILE).write_text(report.to_markdown() + "\n", encoding="utf-8")
    panels = [
        (f"{heading} ({MODE_NAMES[mode]})" if task == "easy-vqa" else heading, report.points(task, mode))
        for heading, task, mode in ACCURACIES
    ]
    if any(points for _, points in panels):
        title = "Accuracy and time to the first token" + (" (quick run: compares nothing)" if report.is_quick else "")
        draw_figure(title, [panel for panel in panels if panel[1]], folder / FIGURE_FILE)
    return report


def put_between_marks(text: str, report: Report, mark: str = MARK) -> str:
    """The document with the report's tables between their marks. Raises ValueError if it has no marks."""
    tables = {
        mark: report.to_markdown(),
        DIFFERENCES.format(mark): report.differences(),
        LOSSES.format(mark): report.differences(FULL),
    }
    return put_tables(text, tables)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m tokenpacker.compare.report`."""
    parser = argparse.ArgumentParser(prog="tokenpacker.compare.report", description="Rewrites a comparison's report.")
    parser.add_argument("folder", type=Path, help=f"folder with {RESULTS}, or the file itself")
    parser.add_argument(
        "documents", type=Path, nargs="*", help=f"files with marks for tables, such as {BEGIN.format(MARK)}"
    )
    parser.add_argument("--mark", default=MARK, help="name of the marks (default: %(default)s)")
    options = parser.parse_args(arguments)
    path = options.folder / RESULTS if options.folder.is_dir() else options.folder
    report = write_report(path.parent, of_one_protocol(read_rows(path)))
    for document in options.documents:
        text = document.read_text(encoding="utf-8")
        document.write_text(put_between_marks(text, report, options.mark), encoding="utf-8")


def _plain(mean: Mean | None) -> dict[str, float | None] | None:
    return None if mean is None else {"mean": mean.mean, "half_interval_95": mean.half}


def _process_text(row: Row) -> str:
    return f"{machine_text(row['machine'])} a process"


if __name__ == "__main__":
    main()
