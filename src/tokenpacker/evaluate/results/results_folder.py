"""A folder that `tokenpacker evaluate --out` has written: the run, the numbers, and the answer to every question."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, FiniteFloat, TypeAdapter, ValidationError

from tokenpacker.evaluate.answer_rows import AnswerRow
from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.metrics.metric import Metric

RESULTS, ANSWERS = "results.json", "answers"
MAX_SCORE = 100.0  # of an answer; CIDEr's go up to 10, all others to 1
_ROW = TypeAdapter(AnswerRow)


class ProblemEntry(BaseModel):
    """Something wrong with a data set, as `layouts.Problem` has it."""

    kind: str
    where: str
    text: str


class TaskEntry(BaseModel):
    """A task of a run: what it asked, and how."""

    name: str
    protocol: str | None = None
    metric: str | None = None
    data: str | None = None
    split: str | None = None
    source: str = ""
    questions: int = 0
    problems: list[ProblemEntry] = []


class PlanEntry(BaseModel):
    """How many tokens the images of a run got, as `answer_rows.Plan` has it."""

    name: str
    scale_factor: int | Literal["auto"] | None = None
    max_image_tokens: int | None = None


class RunEntry(BaseModel):
    """A run: the model, the tasks, the plans."""

    format: Literal[1]
    model: str
    fingerprint: str = ""
    versions: dict[str, str] = {}
    machine: Any = None
    limit: int | None = None
    seed: int = 0
    skip_broken: bool = False
    tasks: list[TaskEntry]
    plans: list[PlanEntry]


class ResultEntry(BaseModel):
    """The numbers of a task under a plan. `image_tokens` is the mean of the questions with images."""

    task: str
    plan: str
    numbers: dict[str, FiniteFloat]
    interval_95: dict[str, tuple[FiniteFloat, FiniteFloat]] = {}
    questions: int
    answered: int
    problems: int
    not_asked: list[ProblemEntry] = []  # beside the problems of the data
    image_tokens: FiniteFloat | None = None
    seconds: FiniteFloat | None = None

    @property
    def headline(self) -> str | None:
        """Name of the first number; None where only a server can tell."""
        return next(iter(self.numbers), None)

    @property
    def score(self) -> float | None:
        """The headline."""
        return None if self.headline is None else self.numbers[self.headline]

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the headline, (low, high)."""
        return self.interval_95.get(self.headline or "")


class ResultsFile(BaseModel):
    """Content of results.json."""

    run: RunEntry
    results: list[ResultEntry]


@dataclass(frozen=True)
class AskedTask:
    """The questions of a task, read anew from its data; none with the reason if the data are gone."""

    metric: Metric | None = None
    questions: Mapping[str, BenchQuestion] = field(default_factory=dict)
    missing: str = ""


class ResultsFolder:
    """Reads a folder of results.

    Raises:
        ValueError: if it holds no results, or those of another format; the message is one line.
    """

    def __init__(self, path: Path):
        self.path = path
        file = path / RESULTS
        if not file.is_file():
            raise ValueError(f"{path} has no {RESULTS}; give a folder that tokenpacker evaluate --out has written")
        try:
            content = ResultsFile.model_validate_json(file.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "its JSON"
            raise ValueError(
                f"{file} is no file of results ({place}: {first['msg']}); write it anew with tokenpacker evaluate --out"
            ) from None
        self.run, self.results = content.run, content.results
        names = {task.name for task in self.run.tasks}
        if unknown := [result.task for result in self.results if result.task not in names]:
            raise ValueError(f"{file} has results of {unknown[0]!r}, which is no task of its run; write it anew")

    def of_task(self, name: str) -> list[ResultEntry]:
        """A task's results, most tokens first."""
        return sorted(
            (entry for entry in self.results if entry.task == name), key=lambda entry: -(entry.image_tokens or 0.0)
        )

    def answers(self, result: ResultEntry, asked: AskedTask) -> dict[str, AnswerRow]:
        """The answers of a task under a plan by the ids of their questions, without those that a run leaves out.

        A metric that scores all answers together, such as CIDEr, scores them again here.

        Raises:
            ValueError: if the file is missing, damaged, or outside of the folder.
        """
        path = self.path / ANSWERS / result.task / f"{result.plan}.jsonl"
        if not path.resolve().is_relative_to((self.path / ANSWERS).resolve()):
            raise ValueError(f"{path} is outside of {self.path}; use results that tokenpacker evaluate has written")
        if not path.is_file():
            raise ValueError(f"{path} is missing; call tokenpacker evaluate again with the same --out")
        rows: dict[str, AnswerRow] = {}
        whole, _, _ = path.read_bytes().rpartition(b"\n")  # a killed run may have left a part of a line
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = _ROW.validate_json(line)
                if row.score is not None and not 0 <= row.score <= MAX_SCORE:  # NaN is not, either
                    raise ValueError(f"score={row.score}")
            except ValueError:  # pydantic's is one
                raise ValueError(f"{path}, line {number} is no answer; delete the line and evaluate again") from None
            if not (self.run.skip_broken and row.problem):
                rows[row.id] = row
        if asked.metric is None or asked.metric.scores_single:
            return rows
        questions = [asked.questions[id] for id in rows if id in asked.questions]
        scored = asked.metric.rows(questions, {id: row.answer for id, row in rows.items()})
        return rows | {each.question.id: replace(rows[each.question.id], score=each.score) for each in scored}


def ask_again(task: TaskEntry) -> AskedTask:
    """A task's questions and metric, found by what its run says."""
    from tokenpacker.evaluate.bench_tasks import find_bench

    try:
        bench = find_bench(task.name, data=task.data, protocol=task.protocol, metric=task.metric, split=task.split)
    except (ValueError, OSError, ImportError) as error:
        return AskedTask(missing=" ".join(str(error).split()))
    return AskedTask(bench.metric, {question.id: question for question in bench.loaded.questions})
