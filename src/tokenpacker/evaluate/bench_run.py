"""Runs tasks at several token budgets, into a folder of results that a later run goes on with.

run.json                 what was run: settings, data, and what is wrong with the data
answers/TASK/PLAN.jsonl  an `AnswerRow` a line, in the order in which they were answered
results.json             the numbers of each task and plan
report.html              the same as a page, with examples
submissions/             files for servers that score
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenpacker.evaluate.answer_rows import AnswerRow, Plan
from tokenpacker.evaluate.bench_folder import RunFolder, RunSettings, kept_rows
from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.bench_tasks import Bench
from tokenpacker.evaluate.layouts import Problem
from tokenpacker.evaluate.metrics import Row
from tokenpacker.progress import Progress
from tokenpacker.whole_files import WholeLines

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from tokenpacker.evaluate.asker import Asker, ImageGroup

SCORE_SHARE = 20  # the running score is computed anew once this many times the time that it took has passed
SECOND = 1.0
SHOWN = 3  # questions of a task and plan that could not be asked


@dataclass
class BenchOutcome:
    """What a run gave.

    Args:
        results: as in results.json, of each task and plan that has answers.
        stopped: whether Ctrl-C ended it, so that the last result is that of a part.
    """

    results: list[dict[str, Any]] = field(default_factory=list)
    stopped: bool = False


def run_benches(
    benches: Sequence[Bench],
    plans: Sequence[Plan],
    out: Path,
    load: Callable[[], tuple[PreTrainedModel, ProcessorMixin]],
    settings: RunSettings,
    *,
    batch_size: int = 64,
    overwrite: bool = False,
    progress: bool = True,
    report: bool = True,
    on_result: Callable[[dict[str, Any]], None] = lambda result: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> BenchOutcome:
    """Answers all questions that have no answer in `out`, and writes results, page and submissions there.

    On Ctrl-C the outcome is that of a part. The same call goes on.

    Args:
        out: the folder; made if it is not there.
        load: gives model and processor, once everything else is checked.
        settings: what else decides the answers.
        batch_size: questions answered at once, rounded up to whole images.
        overwrite: starts anew in a folder of another run.
        report: whether the page is written.
        on_result: gets each result as soon as it is there.
        on_note: gets a line about answers of an earlier call, questions that could not be asked, and files that could
            not be written.

    Raises:
        ValueError: if `out` holds something else or another process writes it, for a limit below 1, and for questions
            about masks to a model that takes none.
        OSError: if the disk is full.
    """
    drawn = [settings.draw(bench) for bench in benches]
    folder = RunFolder(out, settings.describe(benches, drawn, plans))
    outcome = BenchOutcome()
    with folder.only_writer():
        fresh = folder.check(overwrite)
        model, processor = load()
        from tokenpacker.evaluate.asker import Asker
        from tokenpacker.evaluate.evaluation import require_regions

        for bench, questions in zip(benches, drawn, strict=True):
            if any("regions" in question.extra for question in questions):
                require_regions(model, bench.name)
        if fresh:
            folder.begin(model)
        before = folder.seconds()
        for (bench, questions), plan in product(zip(benches, drawn, strict=True), plans):
            one = TaskRun(bench, questions, plan, folder.answers(bench.name, plan.name), settings.skip_broken)
            if one.rows:
                left = len(questions) - len(one.rows)
                on_note(f"{one.title}: {len(one.rows):,} questions have answers from before, {left:,} are left")
            start = time.perf_counter() - (before.get((bench.name, plan.name), 0.0) if one.rows else 0.0)
            outcome.stopped = not one.answer_rest(Asker(model, processor, **asdict(plan)), batch_size, progress)
            if one.rows:
                outcome.results.append(one.result(time.perf_counter() - start))
                folder.write_results(outcome.results)
                on_result(outcome.results[-1])
                for problem in outcome.results[-1]["not_asked"][:SHOWN]:
                    on_note(f"{one.title}, question {problem['where']}: {problem['text']}")
            if outcome.stopped:
                return outcome
            try:
                folder.write_submission(bench, plan, questions, one.answers)
            except ModuleNotFoundError as error:
                on_note(str(error))
        if report:
            folder.write_report()
    return outcome


class TaskRun:
    """A task at a plan: the rows that are there, and those to come.

    Args:
        path: of the rows.
        skip_broken: whether questions that cannot be asked are left out of the numbers.
    """

    def __init__(self, bench: Bench, questions: Sequence[BenchQuestion], plan: Plan, path: Path, skip_broken: bool):
        self.bench, self.questions, self.plan, self.path = bench, questions, plan, path
        self.skip_broken = skip_broken
        self.by_id = {question.id: question for question in questions}
        self.rows, self.end = kept_rows(path, self.by_id)

    @property
    def title(self) -> str:
        """What reports call it."""
        return f"{self.bench.name} {self.plan.name}"

    @property
    def answers(self) -> dict[str, str]:
        """The answers by the ids of their questions."""
        return {name: row.answer for name, row in self.rows.items() if row.answer is not None}

    def answer_rest(self, asker: Asker, batch_size: int, progress: bool) -> bool:
        """Asks all questions that have no row, and writes each batch of rows at once. False if Ctrl-C ended it."""
        rest = [question for question in self.questions if question.id not in self.rows]
        score = RunningScore(self.bench, [self._scored(row) for row in self.rows.values() if self._counts(row)])
        shown = Progress(self.title, len(self.questions), done=len(self.rows), shown=progress and bool(rest))
        with WholeLines(self.path, self.end) as file, shown:
            try:
                for rows in self._answered(asker, rest, batch_size):
                    file.append(b"".join(row.to_line() for row in rows))
                    self.rows |= {row.id: row for row in rows}
                    score.add([self._scored(row) for row in rows if self._counts(row)])
                    shown.update(len(self.rows), score.note(last=len(self.rows) == len(self.questions)))
            except KeyboardInterrupt:
                return False
        return True

    def _answered(self, asker: Asker, rest: Sequence[BenchQuestion], batch_size: int) -> Iterator[list[AnswerRow]]:
        if broken := [question for question in rest if question.is_broken]:
            yield [self._broken_row(question, question.extra["problem"]) for question in broken]
        max_new_tokens = self.bench.protocol.max_new_tokens
        groups = self._groups([question for question in rest if not question.is_broken])
        for batch in asker.batches(groups, batch_size, max_new_tokens):
            rows = []
            for group, replies in zip(batch, asker.answer(batch, max_new_tokens), strict=True):
                if isinstance(replies, ValueError):
                    rows += [self._broken_row(question, str(replies)) for question in group.of]
                    continue
                for question, text, reply in zip(group.of, group.texts, replies, strict=True):
                    if isinstance(reply, ValueError):
                        rows.append(self._broken_row(question, str(reply)))
                        continue
                    counts = {name: value for name, value in vars(reply).items() if name != "text"}
                    score = self._score(question, reply.text)
                    rows.append(AnswerRow(id=question.id, prompt=text, answer=reply.text, score=score, **counts))
            yield rows

    def _groups(self, questions: Sequence[BenchQuestion]) -> Iterator[ImageGroup]:
        """Questions about the same images together, in the order of the data."""
        from tokenpacker.evaluate.asker import ImageGroup

        alike: dict[str, list[BenchQuestion]] = {}
        for question in questions:
            alike.setdefault(question.image_key, []).append(question)
        for group in alike.values():
            regions: dict[int, Any] = {}  # each once, however many questions point at it
            marked = []
            for question in group:
                pointed_at = question.extra.get("regions", ())
                regions |= {id(region): region for region in pointed_at}
                marked.append([id(region) for region in pointed_at])
            places = {key: place for place, key in enumerate(regions)}
            yield ImageGroup(
                images=group[0].images,
                texts=tuple(self.bench.protocol.prompt(question) for question in group),
                regions=tuple(regions.values()),
                marked=tuple(tuple(places[key] for key in keys) for keys in marked),
                of=group,
            )

    def _score(self, question: BenchQuestion, answer: str | None) -> float | None:
        bench = self.bench
        if not (bench.is_scored and bench.metric.scores_single):
            return None
        return 0.0 if answer is None else bench.metric.score(answer, question)

    def _broken_row(self, question: BenchQuestion, problem: str) -> AnswerRow:
        score = self._score(question, None)
        none = {"image_tokens": 0, "prompt_tokens": 0, "answer_tokens": 0}
        return AnswerRow(id=question.id, prompt="", answer=None, score=score, problem=problem, **none)

    def _counts(self, row: AnswerRow) -> bool:
        return not (self.skip_broken and row.problem)

    def _scored(self, row: AnswerRow) -> Row:
        return Row(self.by_id[row.id], row.answer, row.score or 0.0)

    def result(self, seconds: float) -> dict[str, Any]:
        """The numbers of the rows so far, as in results.json."""
        counted = [question for question in self.questions if question.id in self.rows]
        counted = [question for question in counted if self._counts(self.rows[question.id])]
        numbers: dict[str, float] = {}
        interval = {}
        if self.bench.is_scored and counted:
            from tokenpacker.evaluate.results import bootstrap

            rows = self.bench.metric.rows(counted, self.answers)
            numbers = self.bench.metric.aggregate(rows)
            interval = {next(iter(numbers)): list(bootstrap.interval(self.bench.metric, rows))}
        tokens = [row.image_tokens for row in self.rows.values() if row.image_tokens]
        return {
            "task": self.bench.name,
            "plan": self.plan.name,
            "numbers": numbers,
            "interval_95": interval,
            "questions": len(self.questions),
            "answered": len(self.answers),
            "problems": sum(row.problem is not None for row in self.rows.values()),
            "not_asked": [
                asdict(Problem("could not be asked", row.id, row.problem))
                for row in self.rows.values()
                if row.problem and not self.by_id[row.id].is_broken
            ],
            "image_tokens": sum(tokens) / len(tokens) if tokens else 0.0,
            "seconds": round(seconds, 3),
        }


class RunningScore:
    """The headline of the rows so far, computed anew only so often that this takes little time."""

    def __init__(self, bench: Bench, rows: list[Row]):
        self.bench, self.rows, self.text, self.next = bench, rows, "", 0.0
        self.shown = bench.is_scored and bench.metric.scores_single

    def add(self, rows: Sequence[Row]) -> None:
        """More rows."""
        self.rows += rows

    def note(self, last: bool = False) -> str:
        """Such as `accuracy 81.3`; empty for what only a server or all answers together can score.

        Args:
            last: that of all rows, however little time has passed.
        """
        now = time.monotonic()
        if self.shown and self.rows and (last or now >= self.next):
            name, value = next(iter(self.bench.metric.aggregate(self.rows).items()))
            took = time.monotonic() - now
            self.text, self.next = f"{name} {value:.1f}", now + max(SECOND, SCORE_SHARE * took)
        return self.text


def summary(result: Mapping[str, Any]) -> str:
    """A result in one line."""
    numbers, asked = result["numbers"], result["answered"] + result["problems"]
    text = f"{result['task']} {result['plan']}: "
    if numbers:
        (name, value), (low, high) = next(iter(numbers.items())), next(iter(result["interval_95"].values()))
        text += f"{name} {value:.1f} (95 % interval {low:.1f} to {high:.1f}), "
    else:
        text += "scored by a server, "
    part = f"{asked:,} of " if asked < result["questions"] else ""
    text += f"{part}{result['questions']:,} questions"
    text += f", {result['problems']:,} of them not asked" if result["problems"] else ""
    return text + (f", {result['image_tokens']:.0f} image tokens" if result["image_tokens"] else "")
