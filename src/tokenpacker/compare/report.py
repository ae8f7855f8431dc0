"""The rows of a results file as people read them: compare.json, compare.md, compare.png, and tables in documents.

    python -m tokenpacker.compare.report docs/comparison README.md docs/comparison.md

writes the three files beside `results.jsonl`, and the tables between the marks of the documents that are named. All
numbers come from the rows. With `--mark NAME` the marks are those of another comparison in the same document.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenpacker.compare.figure import Point, draw_figure
from tokenpacker.compare.intervals import Mean
from tokenpacker.compare.results import RESULTS, RUN, SPEED, Row, latest, of_one_protocol, read_rows
from tokenpacker.compare.runs import STAGES
from tokenpacker.compare.tiles import HD, ONE_TILE
from tokenpacker.evaluate.tables import UNKNOWN, markdown, milliseconds, number

JSON_FILE, TABLE_FILE, FIGURE_FILE = "compare.json", "compare.md", "compare.png"
BEGIN, END = "<!-- {}:begin -->", "<!-- {}:end -->"
MARK, DIFFERENCES, LOSSES = "compare", "{}-differences", "{}-losses"  # marks of the tables in documents
REFERENCE, FULL = "token-packer", "mlp"  # that the others' differences are told from
QUICK_NOTE = "**Quick run: too few steps and questions to compare anything. It shows that everything runs.**"
# What is told of accuracy: heading, task, mode. Pictures of easy-VQA are one tile in both modes.
ACCURACIES = (
    ("easy-VQA", "easy-vqa", ONE_TILE),
    ("fine print, HD", "fine-print", HD),
    ("fine print, one tile", "fine-print", ONE_TILE),
)
GIGA = 10**9


@dataclass(frozen=True)
class Group:
    """A projector at a scale factor: its runs, one for each seed, and what was measured of its speed by mode."""

    runs: tuple[Row, ...]
    speed: dict[str, dict[str, Any]]

    @property
    def name(self) -> str:
        """The projector's."""
        return self.runs[0]["projector"]

    @property
    def tokens(self) -> int:
        """Of a tile."""
        return self.runs[0]["tokens_per_tile"]

    def accuracy(self, task: str, mode: str) -> Mean | None:
        """In percent, over seeds; None where the task was not asked."""
        scores = [row["scores"][task][mode] for row in self.runs if task in row["scores"]]
        return Mean.of([_percent(score) for score in scores]) if scores else None

    def difference(self, other: Group, task: str, mode: str) -> Mean | None:
        """In percentage points from another, seed by seed: with one seed both saw the same pictures."""
        ours, others = ({row["seed"]: row["scores"] for row in group.runs} for group in (self, other))
        pairs = [(ours[seed], others[seed]) for seed in ours if seed in others and task in ours[seed]]
        points = [_percent(one[task][mode]) - _percent(two[task][mode]) for one, two in pairs]
        return Mean.of(points) if points else None

    def loss(self, stage: str) -> Mean:
        """The last one, over seeds."""
        return Mean.of([row["losses"][stage] for row in self.runs])

    def first_token(self, mode: str) -> float | None:
        """Median of the time to the first token in milliseconds."""
        return self.speed[mode]["milliseconds"]["first_token"]["median"] if mode in self.speed else None

    def multiplications(self, mode: str) -> int | None:
        """Of vision, projector and prefill together."""
        return sum(self.speed[mode]["multiplications"].values()) if mode in self.speed else None


@dataclass(frozen=True)
class Report:
    """Everything that rows of one protocol say. Raises ValueError for none."""

    rows: list[Row]

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("there is no row of a finished run; let tokenpacker compare finish one")

    @property
    def runs(self) -> list[Row]:
        """One row for each run."""
        return list(latest(self.rows, RUN).values())

    @property
    def speed(self) -> Row | None:
        """The last measurement of times."""
        return next(reversed(latest(self.rows, SPEED).values()), None)

    @property
    def groups(self) -> list[Group]:
        """By number of tokens, the most first, then by name."""
        runs: dict[tuple[str, int], list[Row]] = {}
        for row in sorted(self.runs, key=lambda row: row["seed"]):
            runs.setdefault((row["projector"], row["scale_factor"]), []).append(row)
        speed: dict[tuple[str, int], dict[str, Any]] = {}
        for entry in self.speed["rows"] if self.speed else ():
            speed.setdefault((entry["projector"], entry["scale_factor"]), {})[entry["mode"]] = entry
        groups = [Group(tuple(members), speed.get(key, {})) for key, members in runs.items()]
        return sorted(groups, key=lambda group: (-group.tokens, group.name))

    @property
    def is_quick(self) -> bool:
        """Whether it only shows that everything runs."""
        return any(row["quick"] for row in self.runs)

    @property
    def modes(self) -> list[str]:
        """Those that times were measured in."""
        return [mode for mode in (ONE_TILE, HD) if any(mode in group.speed for group in self.groups)]

    def to_markdown(self) -> str:
        """The table, what stands in it, and where it came from."""
        lines = [QUICK_NOTE, ""] if self.is_quick else []
        lines += [*self._table(), "", self._legend(), "", self._origin()]
        return "\n".join(lines)

    def differences(self, name: str = REFERENCE) -> str:
        """The table of differences from a projector with as many tokens; empty where there are none to tell.

        From `FULL`, which keeps all tokens, with any number of them.
        """
        groups, rows = self.groups, []
        references = {group.tokens: group for group in groups if group.name == name}
        full = next(iter(references.values()), None) if name == FULL else None
        for group in groups:
            reference = full or references.get(group.tokens)
            if reference is None or group is reference:
                continue
            told = [group.difference(reference, task, mode) for _, task, mode in self._accuracies]
            rows.append([group.name, number(group.tokens), *(UNKNOWN if d is None else d.text(sign="+") for d in told)])
        header = ["projector", "tokens", *(heading for heading, *_ in self._accuracies)]
        return "\n".join(markdown(header, rows)) if rows and self._accuracies else ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the table's numbers unrounded, and the rows that they come from."""
        return {
            "quick": self.is_quick,
            "protocol": self.runs[0]["protocol"],
            "groups": [self._group(group) for group in self.groups],
            "runs": self.runs,
            "speed": self.speed,
        }

    def points(self, task: str, mode: str) -> list[Point]:
        """One circle for each group whose accuracy and time are known."""
        points = []
        for group in self.groups:
            accuracy, time = group.accuracy(task, mode), group.first_token(mode)
            if accuracy is not None and time is not None:
                points.append(Point(group.name, group.tokens, time, accuracy.mean, accuracy.half))
        return points

    @property
    def _accuracies(self) -> list[tuple[str, str, str]]:
        asked = {task for row in self.runs for task in row["scores"]}
        return [entry for entry in ACCURACIES if entry[1] in asked]

    def _table(self) -> list[str]:
        accuracies = self._accuracies
        header = ["projector", "tokens", *(heading for heading, *_ in accuracies)]
        header += [] if accuracies else ["loss, stage 1", "loss, stage 2"]
        header += ["parameters"]
        header += [f"G mult., {_written(mode)}" for mode in self.modes]
        header += [f"ms, {_written(mode)}" for mode in self.modes]
        return markdown(header, [self._cells(group) for group in self.groups])

    def _cells(self, group: Group) -> list[str]:
        cells = [group.name, number(group.tokens)]
        for _, task, mode in self._accuracies:
            accuracy = group.accuracy(task, mode)
            cells.append(UNKNOWN if accuracy is None else accuracy.text())
        if not self._accuracies:
            cells += [group.loss(stage).text(3) for stage in STAGES]
        cells.append(number(group.runs[0]["parameters"]))
        counts = [group.multiplications(mode) for mode in self.modes]
        cells += [UNKNOWN if count is None else f"{count / GIGA:.2f}" for count in counts]
        return [*cells, *(milliseconds(group.first_token(mode)) for mode in self.modes)]

    def _legend(self) -> str:
        seeds = sorted({row["seed"] for row in self.runs})
        lacking = [group for group in self.groups if len(group.runs) < len(seeds)]
        text = f"Seed {seeds[0]} alone, so no interval."
        if len(seeds) > 1:
            text = f"Seeds {', '.join(map(str, seeds))}: mean and 95 % interval over them (Student's t)."
        if lacking:
            missing = ", ".join(f"{group.name} at {group.tokens} tokens has {len(group.runs)}" for group in lacking)
            text += f" Not all are finished: {missing}."
        if self._accuracies:
            text += " Accuracy in percent, exact match of free answers."
            text += f" {self._questions()}"
        text += " Tokens: of one tile. Parameters: the projector's."
        if self.modes:
            text += " G mult. and ms: multiplications in 10^9 and time to the first token in milliseconds (median),"
            text += " vision tower, projector and prefill together, batch 1."
        return text

    def _questions(self) -> str:
        scores = self.runs[-1]["scores"]
        counted = [f"{task} {scores[task][ONE_TILE]['questions']:,}" for task in scores]
        return f"Questions: {', '.join(counted)}; images of easy-VQA are one tile with HD and without."

    def _origin(self) -> str:
        last = self.runs[-1]
        machines = sorted({_machine(row["machine"]) for row in self.runs})
        dates = sorted(row["date"][:10] for row in self.runs)
        days = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        minutes = statistics.mean(row["seconds"]["all"] for row in self.runs) / 60
        text = (
            f"`{last['command']}`: {' + '.join(last['recipe'])}, {last['steps']['align']:,} +"
            f" {last['steps']['instruct']:,} steps, {len(self.runs)} runs of {minutes:.1f} minutes on average, {days},"
            f" {'; '.join(machines)}."
        )
        if self.speed is None:
            return text
        speed = self.speed
        return f"{text} Times: {speed['rounds']} rounds, {speed['date'][:10]}, {_machine(speed['machine'])}."

    def _group(self, group: Group) -> dict[str, Any]:
        return {
            "projector": group.name,
            "scale_factor": group.runs[0]["scale_factor"],
            "tokens_per_tile": group.tokens,
            "parameters": group.runs[0]["parameters"],
            "seeds": [row["seed"] for row in group.runs],
            "accuracy_percent": {
                task: {mode: _plain(group.accuracy(task, mode)) for mode in modes}
                for task, modes in group.runs[0]["scores"].items()
            },
            "last_loss": {stage: _plain(group.loss(stage)) for stage in STAGES},
            "speed": group.speed,
        }


def write_report(folder: Path, rows: list[Row]) -> Report:
    """Writes the three files from rows of one protocol. Raises ValueError for none."""
    report = Report(rows)
    (folder / JSON_FILE).write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    (folder / TABLE_FILE).write_text(report.to_markdown() + "\n", encoding="utf-8")
    panels = [
        (f"{heading} ({_written(mode)})" if task == "easy-vqa" else heading, report.points(task, mode))
        for heading, task, mode in ACCURACIES
    ]
    if any(points for _, points in panels):
        title = "Accuracy and time to the first token" + (" (quick run: compares nothing)" if report.is_quick else "")
        draw_figure(title, [panel for panel in panels if panel[1]], folder / FIGURE_FILE)
    return report


def put_between_marks(text: str, report: Report, mark: str = MARK) -> str:
    """The document with the report's tables between their marks. Raises ValueError for one without marks."""
    tables = {
        mark: report.to_markdown(),
        DIFFERENCES.format(mark): report.differences(),
        LOSSES.format(mark): report.differences(FULL),
    }
    marked = [name for name in tables if text.count(BEGIN.format(name)) == text.count(END.format(name)) == 1]
    if not marked:
        begin, end = BEGIN.format(mark), END.format(mark)
        raise ValueError(f"the document must have {begin} and {end} once each; write them where the table belongs")
    for name in marked:
        begin, end = BEGIN.format(name), END.format(name)
        place = text.index(begin) + len(begin)
        text = f"{text[:place]}\n{tables[name]}\n{text[text.index(end) :]}"
    return text


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


def _percent(score: dict[str, Any]) -> float:
    return 100 * score["correct"] / score["questions"]


def _plain(mean: Mean | None) -> dict[str, float | None] | None:
    return None if mean is None else {"mean": mean.mean, "half_interval_95": mean.half}


def _written(mode: str) -> str:
    return {ONE_TILE: "one tile", HD: "HD"}[mode]


def _machine(machine: dict[str, Any]) -> str:
    name = machine.get("gpu") or machine["processor"]
    return f"{name}, {machine['cores']} cores, {machine['threads']} thread{'s' * (machine['threads'] > 1)} a process"


if __name__ == "__main__":
    main()
