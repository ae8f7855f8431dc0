"""Two runs compared on the questions that both have: differences with paired intervals, and what changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenpacker.evaluate.answer_rows import AnswerRow
from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.metrics.metric import Metric, Row, mean_score
from tokenpacker.evaluate.results import bootstrap
from tokenpacker.evaluate.results.elastic_curve import number, span
from tokenpacker.evaluate.results.page_parts import (
    MAX_EXAMPLES,
    Example,
    Pictures,
    Reply,
    one_of_each_image,
    write_page,
)
from tokenpacker.evaluate.results.results_folder import AskedTask, ResultEntry, ResultsFolder, TaskEntry, ask_again

PAGE_EXAMPLES = 60  # of all tasks and plans
Answers = tuple[dict[str, AnswerRow], dict[str, AnswerRow]]
"""By id, of both runs."""
_SAME = ("protocol", "data", "split", "source")  # of a task, or the numbers may differ for another reason
_WITHOUT_DATA = Metric(
    name="mean score", description="mean score of all questions", rule=lambda *_: 0.0, summary=mean_score("mean score")
)


@dataclass(frozen=True)
class Change:
    """A task under a plan in both runs. Numbers and counts are of the shared questions."""

    task: str
    plans: tuple[str, str]
    headline: str
    numbers: tuple[float, float]
    interval: tuple[float, float]
    shared: int
    gained: Sequence[str]  # ids of questions with a better answer in the second run, the greatest gain first
    lost: Sequence[str]
    notes: Sequence[str]
    answers: Answers
    asked: AskedTask

    @property
    def difference(self) -> float:
        """The second run minus the first."""
        return self.numbers[1] - self.numbers[0]

    @property
    def is_noise(self) -> bool:
        """Whether the interval of the difference holds 0."""
        return self.interval[0] <= 0 <= self.interval[1]

    @property
    def name(self) -> str:
        """The task with its plan, or with both plans where they differ."""
        first, second = self.plans
        return f"{self.task}, {first}" if first == second else f"{self.task}, {first} against {second}"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        names = ("task", "plans", "headline", "numbers", "difference", "interval", "shared", "gained", "lost", "notes")
        return {("interval_95" if name == "interval" else name): getattr(self, name) for name in names}

    def line(self) -> str:
        """The change as a line of text."""
        verdict = "within noise" if self.is_noise else "more than noise"
        return (
            f"{self.name}: {self.headline} {number(self.numbers[0])} -> {number(self.numbers[1])},"
            f" {number(self.difference, '+')} (95 % interval {span(self.interval, '+')}: {verdict});"
            f" {len(self.gained):,} gained, {len(self.lost):,} lost of {self.shared:,} questions"
        )


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side; `notes` say what else differs or could not be compared."""

    first: ResultsFolder
    second: ResultsFolder
    changes: Sequence[Change]
    notes: Sequence[str]

    def lines(self) -> list[str]:
        """The comparison as lines of text."""
        lines = [f"A {self.first.path}: {self.first.run.model}", f"B {self.second.path}: {self.second.run.model}"]
        for change in self.changes:
            lines += [change.line(), *(f"  note: {note}" for note in change.notes)]
        return lines + [f"note: {note}" for note in self.notes]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return {
            "a": {"folder": str(self.first.path), "model": self.first.run.model},
            "b": {"folder": str(self.second.path), "model": self.second.run.model},
            "changes": [change.to_dict() for change in self.changes],
            "notes": list(self.notes),
        }

    def write(self, path: Path) -> Path:
        """Writes the page, with the questions that changed and their pictures; returns its path."""
        pictures = Pictures(parts=len(self.changes))
        share = max(1, min(MAX_EXAMPLES, PAGE_EXAMPLES // len(self.changes)) // 2)
        return write_page(
            path,
            "comparison.html.jinja",
            runs=[("A", self.first), ("B", self.second)],
            changes=[(change, *_examples(change, pictures, share)) for change in self.changes],
            notes=self.notes,
        )


def compare_results(first: Path, second: Path) -> Comparison:
    """Compares two folders of results, task by task and plan by plan.

    Plans are paired by name; a task with one plan in each run is compared whatever the plans are.

    Raises:
        ValueError: for a folder without results, or if the two share no task with a plan and questions.
    """
    one, other = ResultsFolder(first), ResultsFolder(second)
    tasks = {task.name: task for task in other.run.tasks}
    alone = sorted({task.name for task in one.run.tasks} ^ set(tasks))
    notes = [f"only one run has the task {name}" for name in alone]
    notes += [
        f"version of {name} differs: {mine} in A, {theirs} in B"
        for name, mine in one.run.versions.items()
        if (theirs := other.run.versions.get(name, mine)) != mine
    ]
    changes = []
    for task in one.run.tasks:
        if task.name in tasks:
            found, problems = _compare_task(one, other, task, tasks[task.name])
            changes += found
            notes += [f"{task.name}: {problem}" for problem in problems]
    if not changes:
        raise ValueError(f"{first} and {second} have nothing to compare: {'; '.join(notes) or 'they have no results'}")
    return Comparison(one, other, changes, notes)


def _compare_task(
    one: ResultsFolder, other: ResultsFolder, task: TaskEntry, second: TaskEntry
) -> tuple[list[Change], list[str]]:
    """Changes of a task, and why what is missing could not be compared."""
    if task.metric != second.metric:
        return [], [f"the metrics differ ({task.metric}, {second.metric}), so nothing is compared"]
    notes = [
        f"{name} differs: {mine or 'not said'} in A, {theirs or 'not said'} in B"
        for name in _SAME
        if (mine := getattr(task, name)) != (theirs := getattr(second, name))
    ]
    pairs, alone = _pairs(one.of_task(task.name), other.of_task(task.name))
    if not pairs:
        return [], [*notes, *alone]
    asked = ask_again(task)
    again = asked if not notes else ask_again(second)
    changes, problems = [], alone
    for mine, theirs in pairs:
        answers = one.answers(mine, asked), other.answers(theirs, again)
        change = _change(task.name, (mine, theirs), answers, (asked, again), notes)
        if isinstance(change, Change):
            changes.append(change)
        else:
            problems.append(change)
    return changes, problems


def _pairs(
    mine: Sequence[ResultEntry], theirs: Sequence[ResultEntry]
) -> tuple[list[tuple[ResultEntry, ResultEntry]], list[str]]:
    """Results of the same plan, or the only ones of both; and a note on plans that are in one run alone."""
    plans = {entry.plan: entry for entry in theirs}
    pairs = [(entry, plans[entry.plan]) for entry in mine if entry.plan in plans]
    if not pairs and len(mine) == len(theirs) == 1:
        return [(mine[0], theirs[0])], []
    alone = sorted({entry.plan for entry in mine} ^ set(plans))
    return pairs, [f"only one run has the plan {', '.join(alone)}"] if alone else []


def _change(
    task: str,
    entries: tuple[ResultEntry, ResultEntry],
    answers: Answers,
    asked: tuple[AskedTask, AskedTask],
    notes: Sequence[str],
) -> Change | str:
    """What changed on the shared questions; why it cannot be said if there are none with a score in both."""
    notes, plans = list(notes), (entries[0].plan, entries[1].plan)
    if missing := asked[0].missing or asked[1].missing:
        asked = _from_rows(answers[0], missing), _from_rows(answers[1], missing)
        notes.append(f"the data cannot be read ({missing}): compared are mean scores, the questions drawn one by one")
    same, left_out = _shared(answers, asked)
    scored = [id for id in same if all(rows[id].score is not None for rows in answers)]
    metric = asked[0].metric
    if not scored or metric is None:
        why = "score" if same else "question"
        return f"no {why} is shared under {' and '.join(dict.fromkeys(plans))}, so nothing is compared"
    first, second = (
        [Row(asked[0].questions[id], rows[id].answer, rows[id].score or 0.0) for id in scored] for rows in answers
    )
    numbers = metric.aggregate(first), metric.aggregate(second)
    headline = next(iter(numbers[0]))
    gains = {id: after.score - before.score for id, before, after in zip(scored, first, second, strict=True)}
    return Change(
        task=task,
        plans=plans,
        headline=headline,
        numbers=(numbers[0][headline], numbers[1][headline]),
        interval=bootstrap.difference(metric, first, second),
        shared=len(scored),
        gained=sorted((id for id in gains if gains[id] > 0), key=lambda id: (-gains[id], id)),
        lost=sorted((id for id in gains if gains[id] < 0), key=lambda id: (gains[id], id)),
        notes=[*notes, *left_out],
        answers=answers,
        asked=asked[0],
    )


def _shared(answers: Answers, asked: tuple[AskedTask, AskedTask]) -> tuple[list[str], list[str]]:
    """Ids of the questions that both runs have answered, and notes on those that are left out."""
    ids = [id for id in answers[0] if id in answers[1]]
    same = [id for id in ids if _same_question(*(each.questions.get(id) for each in asked))]
    notes = []
    if others := len(ids) - len(same):
        notes.append(f"{others:,} ids belong to other questions in B, or to none now; they are left out")
    if alone := sum(map(len, answers)) - 2 * len(ids):
        notes.append(f"{alone:,} questions are in one run alone; they are left out")
    return same, notes


def _same_question(first: BenchQuestion | None, second: BenchQuestion | None) -> bool:
    if first is None or second is None:
        return False
    return (first.text, first.answers, first.options) == (second.text, second.answers, second.options)


def _examples(change: Change, pictures: Pictures, count: int) -> tuple[list[Example], list[Example]]:
    """Gained and lost questions with their pictures, so many of each."""
    pictures.begin_task()
    gained, lost = (
        [
            pictures.example(
                id,
                [
                    Reply(f"{run}, {plan}", rows[id])
                    for run, plan, rows in zip("AB", change.plans, change.answers, strict=True)
                ],
                change.asked.questions[id],
                change.asked.missing,
            )
            for id in one_of_each_image(ids, change.asked.questions)[:count]
        ]
        for ids in (change.gained, change.lost)
    )
    return gained, lost


def _from_rows(rows: dict[str, AnswerRow], missing: str) -> AskedTask:
    """What is known of the questions without their data: the prompts."""
    questions = {id: BenchQuestion(id=id, text=row.prompt) for id, row in rows.items()}
    return AskedTask(_WITHOUT_DATA, questions, missing)
