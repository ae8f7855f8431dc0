"""200 questions that `evaluate`, lmms-eval and the HTTP endpoint must answer alike."""

from __future__ import annotations

import json
from pathlib import Path

from lmms_tasks import few_signs
from tokenpacker.evaluate import tasks
from tokenpacker.evaluate.answer_rows import Plan
from tokenpacker.evaluate.bench_folder import RunSettings
from tokenpacker.evaluate.bench_run import run_benches
from tokenpacker.evaluate.bench_tasks import Bench, find_bench
from tokenpacker.evaluate.evaluation import draw_questions
from tokenpacker.scenes import Sample

NUMBER = 200


def same_questions() -> list[Sample]:
    """Signs of many sizes with 200 questions about them."""
    samples = draw_questions(few_signs(60), NUMBER, seed=0)
    assert sum(len(sample.questions) for sample in samples) == NUMBER
    return samples


def evaluated(samples: list[Sample], out: Path, model, processor, monkeypatch) -> tuple[Bench, list[str], float]:
    """The task, what `evaluate` answers, in the order of the questions, and its accuracy in percent."""
    task = tasks.Task(name="signs", description="signs", load=lambda: samples)
    monkeypatch.setattr(tasks, "TASKS", {"signs": task})
    bench = find_bench("signs")
    settings = RunSettings(model="tiny", fingerprint="")
    (result,) = run_benches([bench], [Plan()], out, lambda: (model, processor), settings, progress=False).results
    rows = map(json.loads, (out / "answers" / "signs" / "own.jsonl").read_text().splitlines())
    answers = {row["id"]: row["answer"] for row in rows}
    return bench, [answers[question.id] for question in bench.loaded.questions], result["numbers"]["accuracy"]
