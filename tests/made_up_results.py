"""Makes folders of results, as `tokenpacker evaluate --out` writes them, from answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenpacker.evaluate.answer_rows import AnswerRow, Plan
from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.metrics import Row, find_metric
from tokenpacker.evaluate.results.bootstrap import interval

TOKENS = {None: 200, 2: 400, 3: 150, 4: 90}  # by scale factor


class MadeUpRun:
    """Writes a folder of results from answers: (task, plan) -> (answer, score) of each question by its id."""

    def __init__(self, path: Path, model: str = "a-model"):
        self.path, self.plans, self.results = path, {}, []
        self.content = {"format": 1, "model": model, "fingerprint": "abc", "versions": {"torch": "2.6"}}
        self.content |= {"machine": "a processor, 2 cores", "limit": None, "seed": 0, "skip_broken": False, "tasks": []}

    def task(self, name: str, metric: str, questions: Sequence[BenchQuestion], **content) -> None:
        self.questions = {question.id: question for question in questions}
        self.metric = find_metric(metric)
        self.content["tasks"].append(
            {"name": name, "metric": metric, "questions": len(questions), "problems": [], **content}
        )

    def plan(self, plan: Plan, answers: Mapping[str, tuple[str | None, float | None]], **content) -> None:
        self.plans[plan.name] = {
            "name": plan.name,
            "scale_factor": plan.scale_factor,
            "max_image_tokens": plan.max_image_tokens,
        }
        task, tokens = self.content["tasks"][-1]["name"], plan.max_image_tokens or TOKENS[plan.scale_factor]
        file = self.path / "answers" / task / f"{plan.name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [
            AnswerRow(
                id=id,
                prompt=f"Prompt of {id}",
                answer=answer,
                score=score,
                image_tokens=tokens,
                prompt_tokens=tokens + 20,
                answer_tokens=2,
                problem=None if answer is not None else "the image is missing",
            )
            for id, (answer, score) in answers.items()
        ]
        file.write_bytes(b"".join(row.to_line() for row in rows))
        numbers, limits = {}, {}
        if all(score is not None for _, score in answers.values()):
            scored = [Row(self.questions[id], answer, score) for id, (answer, score) in answers.items()]
            numbers = self.metric.aggregate(scored)
            limits = {next(iter(numbers)): interval(self.metric, scored, draws=100)}
        self.results.append(
            {
                "task": task,
                "plan": plan.name,
                "numbers": numbers,
                "interval_95": limits,
                "questions": len(rows),
                "answered": sum(row.answer is not None for row in rows),
                "problems": sum(row.problem is not None for row in rows),
                "image_tokens": float(tokens),
                "seconds": 1.5,
                **content,
            }
        )

    def write(self) -> Path:
        run = {**self.content, "plans": list(self.plans.values())}
        (self.path / "run.json").write_text(json.dumps(run))
        (self.path / "results.json").write_text(json.dumps({"run": run, "results": self.results}))
        return self.path


def answers(questions: Sequence[BenchQuestion], wrong: int, said: str = "go") -> dict[str, tuple[str, float]]:
    """The first questions are answered wrongly."""
    return {each.id: (said, 0.0) if place < wrong else ("stop", 1.0) for place, each in enumerate(questions)}
