"""The page of results: scores against tokens, published numbers beside them, the worst answers, and problems."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenpacker.evaluate.answer_rows import AnswerRow
from tokenpacker.evaluate.bench_tasks import OWN_SUFFIX
from tokenpacker.evaluate.protocols import PROTOCOLS, Protocol
from tokenpacker.evaluate.published import Published, published
from tokenpacker.evaluate.results.elastic_curve import (
    DARK,
    LIGHT,
    curve_table,
    draw_curve,
    draw_curves,
    number,
    plan_text,
    scored,
)
from tokenpacker.evaluate.results.page_parts import (
    Example,
    Pictures,
    Reply,
    figure_address,
    one_of_each_image,
    write_page,
)
from tokenpacker.evaluate.results.results_folder import (
    AskedTask,
    ProblemEntry,
    ResultEntry,
    ResultsFolder,
    TaskEntry,
    ask_again,
)

REPORT, CURVE, CURVE_TABLE = "report.html", "curve.png", "curve.md"
MAX_PROBLEMS = 50  # of a task


@dataclass(frozen=True)
class Beside:
    """A published result and the plan with the closest number of tokens. `differs`: beyond the plan's interval."""

    published: Published
    result: ResultEntry

    @property
    def difference(self) -> float:
        """Ours minus theirs."""
        return self.result.numbers[self.published.number] - self.published.score

    @property
    def differs(self) -> bool | None:
        """Whether the published score is outside of our interval; None without an interval."""
        interval = self.result.interval_95.get(self.published.number)
        return None if interval is None else not interval[0] <= self.published.score <= interval[1]


@dataclass(frozen=True)
class TaskSection:
    """What the page says about a task."""

    task: TaskEntry
    results: Sequence[ResultEntry]
    problems: Sequence[ProblemEntry]
    metric: str
    figure: tuple[str, str, str] | None  # for light and dark pages, and in words
    splits: Sequence[str]
    beside: Sequence[Beside]
    published: Sequence[Published]  # where there is no score to stand beside
    choices: Sequence[tuple[str, str]]
    examples_are: str
    examples: Sequence[Example]


def write_report(folder: Path) -> Path:
    """Writes report.html, curve.png and curve.md into a folder of results, and returns the page's path.

    The page needs no network. Questions and pictures are read anew from the data; without them it says so.

    Raises:
        ValueError: for a folder that holds no results, or damaged ones.
    """
    results = ResultsFolder(folder)
    pictures = Pictures(parts=len(results.run.tasks))
    sections = [_section(results, task, pictures) for task in results.run.tasks]
    (folder / CURVE_TABLE).write_text(curve_table(results), encoding="utf-8", errors="backslashreplace")
    if curve := draw_curves(results):
        curve.save(folder / CURVE, optimize=True)
    return write_page(
        folder / REPORT,
        "results.html.jinja",
        run=results.run,
        plans={plan.name: plan_text(plan) for plan in results.run.plans},
        sections=sections,
        machine=_machine_text(results.run.machine),
        max_problems=MAX_PROBLEMS,
    )


def _section(folder: ResultsFolder, task: TaskEntry, pictures: Pictures) -> TaskSection:
    results, asked = folder.of_task(task.name), ask_again(task)
    pictures.begin_task()
    title, examples = _examples(folder, results, asked, pictures)
    rows = () if (task.data or "").endswith(OWN_SUFFIX) else published(task.name)  # `pope.jsonl` is not POPE
    beside = [Beside(row, _closest(row, fitting)) for row in rows if (fitting := _with_number(results, row.number))]
    names = dict.fromkeys(name for result in results for name in result.numbers)
    return TaskSection(
        task=task,
        results=results,
        problems=_problems(task, results),
        metric=asked.metric.description if asked.metric else "",
        figure=_figure(folder, task.name),
        splits=list(names) if len(names) > 1 else [],
        beside=beside,
        published=[] if beside else rows,
        choices=_choices(folder, task) if any(row.differs for row in beside) else [],
        examples_are=title,
        examples=examples,
    )


def _problems(task: TaskEntry, results: Sequence[ResultEntry]) -> list[ProblemEntry]:
    """Of the data, and of the questions that a plan could not ask, each once."""
    found = {problem.where: problem for result in results for problem in result.not_asked}
    return [*task.problems, *found.values()]


def _figure(folder: ResultsFolder, task: str) -> tuple[str, str, str] | None:
    """None for a single score, which the table has."""
    if len(entries := scored(folder, task)) < 2:
        return None
    light, dark = (figure_address(draw_curve(folder, task, colors)) for colors in (LIGHT, DARK))
    points = ", ".join(f"{number(entry.score)} with {number(entry.image_tokens)} ({entry.plan})" for entry in entries)
    return light, dark, f"Score against image tokens: {points}"


def _with_number(results: Sequence[ResultEntry], name: str) -> list[ResultEntry]:
    return [result for result in results if name in result.numbers]


def _closest(row: Published, results: Sequence[ResultEntry]) -> ResultEntry:
    """The result with the closest number of tokens, as a ratio."""
    return min(results, key=lambda result: abs(math.log(max(1.0, result.image_tokens or 0.0) / row.tokens)))


def _choices(folder: ResultsFolder, task: TaskEntry) -> list[tuple[str, str]]:
    """What may move the score away from the published one: (choice, what it is)."""
    protocols = {name: each for (benchmark, name), each in PROTOCOLS.items() if benchmark == task.name}
    paper = protocols.get("paper", next(iter(protocols.values())))
    own: Protocol | None = protocols.get(task.protocol or "")
    choices = [("protocol", f"yours is {task.protocol or 'not said'}; published numbers follow {paper.name}")]
    choices += [("split", f"yours is {task.split or 'not said'}; the published one is {paper.split or 'not said'}")]
    choices += [(f"protocol {name}", each.note) for name, each in protocols.items() if each.note]
    if own:
        choices += [
            (f"your {what}" if what != "all" else "your protocol", source) for what, source in own.sources.items()
        ]
    if folder.run.limit:
        choices.append(
            ("questions", f"only {folder.run.limit:,} were asked (--limit), drawn by seed {folder.run.seed}")
        )
    if task.problems:
        fate = "are left out (--skip-broken)" if folder.run.skip_broken else "count as wrong"
        choices.append(("broken data", f"problems: {len(task.problems):,}; questions that cannot be asked {fate}"))
    return [*choices, ("model", f"yours is {folder.run.model}; published ones are named with their sizes in the table")]


def _examples(
    folder: ResultsFolder, results: Sequence[ResultEntry], asked: AskedTask, pictures: Pictures
) -> tuple[str, list[Example]]:
    """What the examples are, and the examples: answers that fewer tokens lose, else the worst of the most tokens."""
    answers = {result.plan: folder.answers(result, asked) for result in results}
    if not answers:
        return "", []
    most, *_, least = [*answers.values(), *answers.values()]
    lost = {id: _score(most.get(id)) - _score(row) for id, row in least.items() if _is_scored(row, most.get(id))}
    ids = sorted((id for id in lost if lost[id] > 0), key=lambda id: (-lost[id], id))
    title = f"Right with {results[0].plan}, lost with {results[-1].plan}"
    if not ids:
        wrong = [row for row in most.values() if _is_scored(row) and _score(row) < 1]
        ids = [row.id for row in sorted(wrong, key=lambda row: (_score(row), row.id))]
        title = (
            "Worst answers" if len(results) == 1 else f"Fewer tokens lose no answer; the worst with {results[0].plan}"
        )
    examples = []
    for id in one_of_each_image(ids, asked.questions):
        replies = [Reply(plan, rows[id]) for plan, rows in answers.items() if id in rows]
        examples.append(pictures.example(id, replies, asked.questions.get(id), asked.missing))
    return title, examples


def _is_scored(*rows: AnswerRow | None) -> bool:
    return all(row is not None and row.score is not None and row.problem is None for row in rows)


def _score(row: AnswerRow | None) -> float:
    return row.score or 0.0 if row else 0.0


def _machine_text(machine: object) -> str:
    if isinstance(machine, dict):
        return ", ".join(f"{name} {value}" for name, value in machine.items())
    return str(machine or "")
