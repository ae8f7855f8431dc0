"""The report on a probe: probe.json, probe.md, two figures, and the tables in documents.

    python -m tokenpacker.compare.probe.probe_report docs/probe docs/probe.md

writes the files beside `results.jsonl`, and the tables between the marks of the named documents. All numbers come from
the rows. With `--mark NAME` the marks are those of another probe in the same document.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenpacker.compare.intervals import Mean
from tokenpacker.compare.marked_tables import BEGIN, put_tables
from tokenpacker.compare.probe.probe_figures import draw_over_steps, draw_over_tokens
from tokenpacker.compare.results import RESULTS, RUN, Row, latest, of_one_protocol, read_rows
from tokenpacker.speed.machine import machine_text
from tokenpacker.speed.tables import UNKNOWN, markdown, number
from tokenpacker.whole_files import write_whole

JSON_FILE, TABLE_FILE, TOKENS_FIGURE, STEPS_FIGURE = "probe.json", "probe.md", "probe-tokens.png", "probe-steps.png"
MARK, VERDICT = "probe", "{}-verdict"
REFERENCE = "token-packer"
FEWEST_SEEDS = 3  # for a verdict
BETTER, WORSE, UNDECIDED, TOO_FEW = "better", "worse", "undecided", "too few seeds"
QUICK_NOTE = "**Quick run: too few pictures to compare anything. It shows that everything runs.**"
DEV_NOTE = "**Development pictures: for choosing settings. A verdict needs the test pictures.**"
LOCAL = re.compile(r" --(weights|stamps|output|jobs)[ =]('[^']*'|\S+)")  # options that decide no result
SKIPPED = "{projector} at {tokens} tokens is left out: {reason}"


@dataclass(frozen=True)
class Group:
    """The runs of a projector at a token count and a number of steps, one per seed."""

    runs: tuple[Row, ...]

    @property
    def key(self) -> tuple[str, int, int]:
        """(projector, tokens, steps)."""
        first = self.runs[0]
        return first["projector"], first["tokens"], first["steps"]

    @property
    def accuracy(self) -> Mean:
        """The mean over seeds in percent."""
        return Mean.of([100 * row["accuracy"] for row in self.runs])

    @property
    def curve(self) -> list[tuple[int, Mean]]:
        """Steps, and the mean accuracy after them in percent."""
        points = zip(*(row["curve"] for row in self.runs), strict=True)
        return [(point[0][0], Mean.of([100 * accuracy for _, accuracy in point])) for point in points]

    def of_sort(self, sort: str) -> Mean | None:
        """The accuracy of one sort of question in percent; None where a run has none."""
        if not all(sort in row.get("sorts", ()) for row in self.runs):
            return None
        return Mean.of([100 * row["sorts"][sort] for row in self.runs])

    def difference(self, other: Group) -> Mean | None:
        """The mean difference in percentage points, seed by seed; None without a common seed."""
        theirs = {row["seed"]: row["accuracy"] for row in other.runs}
        points = [100 * (row["accuracy"] - theirs[row["seed"]]) for row in self.runs if row["seed"] in theirs]
        return Mean.of(points) if points else None

    def verdict(self, other: Group) -> str:
        """Whether it is better than another one, by the rule in docs/probe.md."""
        difference = self.difference(other)
        common = {row["seed"] for row in self.runs} & {row["seed"] for row in other.runs}
        if difference is None or difference.half is None or len(common) < FEWEST_SEEDS:
            return TOO_FEW
        if abs(difference.mean) <= difference.half:
            return UNDECIDED
        return BETTER if difference.mean > 0 else WORSE

    def step_ratio(self, other: Group) -> float:
        """The time of a step as a multiple of the other's."""
        ours, theirs = (statistics.median(row["step_ms"] for row in group.runs) for group in (self, other))
        return ours / theirs


class Report:
    """All results in rows of one protocol. Raises ValueError if there is no run."""

    def __init__(self, rows: Sequence[Row], skipped: Sequence[dict[str, Any]] = ()):
        self.rows = list(latest(list(rows), RUN).values())
        if not self.rows:
            raise ValueError("there is no row of a finished run; let tokenpacker probe finish one")
        self.skipped = list(skipped)

    @cached_property
    def groups(self) -> dict[tuple[str, int, int], Group]:
        """Groups by projector, tokens and steps: those with the most tokens first, then by name."""
        runs: dict[tuple[str, int, int], list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: (-row["tokens"], row["projector"], row["steps"], row["seed"])):
            runs.setdefault((row["projector"], row["tokens"], row["steps"]), []).append(row)
        return {key: Group(tuple(members)) for key, members in runs.items()}

    @property
    def steps(self) -> list[int]:
        """The numbers of steps, the smallest first."""
        return sorted({row["steps"] for row in self.rows})

    def reference(self, group: Group) -> Group | None:
        """The group of `REFERENCE` with as many tokens and steps; None for itself, and where there is none."""
        name, tokens, steps = group.key
        return None if name == REFERENCE else self.groups.get((REFERENCE, tokens, steps))

    def to_markdown(self) -> str:
        """The table, its legend, and its origin."""
        lines = [QUICK_NOTE, ""] if self.rows[-1]["quick"] else []
        lines += [DEV_NOTE, ""] if self.rows[-1]["split"] == "dev" else []
        lines += [*self._table(), "", *self._sorts(), self._legend(), "", *self._left_out(), self._origin()]
        return "\n".join(lines)

    def _table(self) -> list[str]:
        header = ["projector", "tokens"]
        for steps in self.steps:
            header += [f"%, {steps:,} steps", f"difference, {steps:,}"]
        rows = []
        for name, tokens in dict.fromkeys(key[:2] for key in self.groups):
            cells = [name, number(tokens)]
            members = [self.groups.get((name, tokens, steps)) for steps in self.steps]
            for group in members:
                cells += [UNKNOWN, UNKNOWN] if group is None else [group.accuracy.text(), self._difference(group)]
            some = next(group for group in members if group is not None)
            base = self.reference(some)
            ratio = "1.00" if name == REFERENCE else UNKNOWN if base is None else f"{some.step_ratio(base):.2f}"
            rows.append([*cells, number(some.runs[0]["parameters"]), ratio])
        return markdown([*header, "parameters", "step time"], rows)

    def _sorts(self) -> list[str]:
        """A table of the accuracy for each sort of question; none if all are of one sort."""
        sorts = list(dict.fromkeys(sort for row in self.rows for sort in row.get("sorts", ())))
        rows = [
            [name, number(tokens), number(steps), *(UNKNOWN if mean is None else mean.text() for mean in means)]
            for (name, tokens, steps), group in self.groups.items()
            for means in [[group.of_sort(sort) for sort in sorts]]
        ]
        return (
            [*markdown(["projector", "tokens", "steps", *(f"{sort}, %" for sort in sorts)], rows), ""] if sorts else []
        )

    def _difference(self, group: Group) -> str:
        reference = self.reference(group)
        difference = None if reference is None else group.difference(reference)
        if reference is None or difference is None:
            return UNKNOWN
        text, verdict = difference.text(sign="+"), group.verdict(reference)
        return f"**{text}**" if verdict in (BETTER, WORSE) and self.judges else text

    @property
    def judges(self) -> bool:
        """Whether a verdict may be given: by the test pictures, all of them."""
        return self.rows[-1]["split"] == "test" and not self.rows[-1]["quick"]

    def verdicts(self) -> str:
        """A line for each number of tokens and steps: who is better than `REFERENCE`, and who is worse."""
        if not self.judges:
            return ""
        found: dict[tuple[int, int], dict[str, list[str]]] = {}
        for group in self.groups.values():
            if (reference := self.reference(group)) is not None:
                name, tokens, steps = group.key
                found.setdefault((tokens, steps), {}).setdefault(group.verdict(reference), []).append(name)
        lines = []
        for (tokens, steps), names in sorted(found.items(), key=lambda item: (-item[0][0], item[0][1])):
            parts = [
                f"{verdict}: {', '.join(names[verdict])}"
                for verdict in (BETTER, WORSE, UNDECIDED, TOO_FEW)
                if verdict in names
            ]
            lines.append(f"- **{tokens:,} tokens, {steps:,} steps.** Against {REFERENCE}: {'; '.join(parts)}.")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the table's numbers unrounded, and their rows."""
        first = self.rows[0]
        shared = {name: first[name] for name in ("quick", "questions", "encoder", "split", "protocol")}
        groups = [self._group(group) for group in self.groups.values()]
        return {**shared, "groups": groups, "skipped": self.skipped, "runs": self.rows}

    def _group(self, group: Group) -> dict[str, Any]:
        name, tokens, steps = group.key
        reference = self.reference(group)
        result = {
            "projector": name,
            "tokens": tokens,
            "steps": steps,
            "seeds": [row["seed"] for row in group.runs],
            "accuracy_percent": _plain(group.accuracy),
            "curve_percent": [{"steps": at, **_plain(mean)} for at, mean in group.curve],
            "parameters": group.runs[0]["parameters"],
        }
        if reference is not None and (difference := group.difference(reference)) is not None:
            result |= {"difference": _plain(difference), "step_time": group.step_ratio(reference)}
            result |= {"verdict": group.verdict(reference)} if self.judges else {}
        return result

    def _legend(self) -> str:
        seeds = sorted({row["seed"] for row in self.rows})
        text = f"Seed {seeds[0]} alone, so no interval."
        if len(seeds) > 1:
            text = f"Seeds {', '.join(map(str, seeds))}: mean and 95 % interval over them (Student's t)."
        few = [group for group in self.groups.values() if len(group.runs) < len(seeds)]
        if few:
            names = [f"{group.key[0]} at {group.key[1]} tokens has {len(group.runs)}" for group in few]
            text += f" Not all are finished: {', '.join(names)}."
        text += f" Accuracy in percent; difference in percentage points from {REFERENCE}, seed by seed, at equal tokens"
        text += f" and steps{'; bold where its interval excludes zero' if self.judges else ''}."
        return f"{text} Parameters: the projector's. Step time: of a training step, as a multiple of {REFERENCE}'s."

    def _left_out(self) -> list[str]:
        return [line for entry in self.skipped for line in (f"{SKIPPED.format(**entry)}.", "")]

    def _origin(self) -> str:
        last = self.rows[-1]
        commands = list(dict.fromkeys(LOCAL.sub("", row["command"]) for row in self.rows))
        command = (
            f"`{commands[0]}`" if len(commands) == 1 else f"{len(commands)} commands, which {RESULTS} has with each run"
        )
        dates = sorted(row["date"][:10] for row in self.rows)
        seconds = statistics.mean(row["seconds"] for row in self.rows)
        machines = sorted({machine_text(row["machine"]) for row in self.rows})
        return (
            f"{command}: {last['questions']}, {last['encoder']}, {len(self.rows)} runs of {seconds:.0f} s on"
            f" average, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, {'; '.join(machines)}."
        )


def write_report(folder: Path, rows: Sequence[Row], skipped: Sequence[dict[str, Any]] = ()) -> Report:
    """Writes JSON, table and figures from rows of one protocol. Raises ValueError if there is no run."""
    report = Report(rows, skipped)
    write_whole(folder / JSON_FILE, json.dumps(report.to_dict(), indent=1) + "\n")
    text = "\n\n".join(part for part in (report.to_markdown(), report.verdicts()) if part)
    write_whole(folder / TABLE_FILE, text + "\n")
    ending = " (quick run: compares nothing)" if report.rows[-1]["quick"] else ""
    groups = list(report.groups.values())
    over_tokens = {group.key: group.accuracy for group in groups}
    draw_over_tokens(f"Accuracy over tokens{ending}", over_tokens, folder / TOKENS_FIGURE)
    longest = {group.key[:2]: group.curve for group in groups if group.key[2] == report.steps[-1]}
    draw_over_steps(f"Accuracy over training steps{ending}", longest, folder / STEPS_FIGURE)
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m tokenpacker.compare.probe.probe_report`."""
    parser = argparse.ArgumentParser(prog="tokenpacker.compare.probe.probe_report", description="Rewrites a report.")
    parser.add_argument("folder", type=Path, help=f"folder with {RESULTS}")
    parser.add_argument("documents", type=Path, nargs="*", help=f"files with marks, such as {BEGIN.format(MARK)}")
    parser.add_argument("--mark", default=MARK, help="name of the marks (default: %(default)s)")
    options = parser.parse_args(arguments)
    written = options.folder / JSON_FILE
    skipped = json.loads(written.read_text(encoding="utf-8"))["skipped"] if written.is_file() else []
    report = write_report(options.folder, of_one_protocol(read_rows(options.folder / RESULTS)), skipped)
    tables = {options.mark: report.to_markdown(), VERDICT.format(options.mark): report.verdicts()}
    for document in options.documents:
        text = document.read_text(encoding="utf-8")
        write_whole(document, put_tables(text, tables))


def _plain(mean: Mean) -> dict[str, float | None]:
    return {"mean": mean.mean, "half_interval_95": mean.half}


if __name__ == "__main__":
    main()
