"""Metrics of the benchmarks: a score for each question, and named numbers for all of them.

Pure Python: no torch is needed. `find_metric` gives a metric by name. `rows` scores the answers to all questions; a
question without an answer has a row with the score 0, and stays in the denominator. `aggregate` makes the named
numbers, the headline first. Scores are 0 to 1 (CIDEr 0 to 10); named numbers are in percent, or in the benchmark's
points.

>>> from tokenpacker.evaluate.bench_question import BenchQuestion
>>> from tokenpacker.evaluate.metrics import find_metric
>>> metric = find_metric("relaxed")
>>> questions = [
...     BenchQuestion(id="1", text="What share is blue?", answers=("100",), extra={"category": "human"}),
...     BenchQuestion(id="2", text="Which bar is highest?", answers=("France",), extra={"category": "augmented"}),
... ]
>>> rows = metric.rows(questions, {"1": "104"})
>>> [(row.answer, row.score) for row in rows]
[('104', 1.0), (None, 0.0)]
>>> metric.aggregate(rows)
{'accuracy': 50.0, 'accuracy/augmented': 0.0, 'accuracy/human': 100.0}

A bootstrap over images gives each row the number of times that its image was drawn:

>>> metric.aggregate(rows, weights=[2, 0])
{'accuracy': 100.0, 'accuracy/human': 100.0}
"""

from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.metrics.metric import Metric, Row, mean_score
from tokenpacker.evaluate.metrics.mmmu import MMMU
from tokenpacker.evaluate.metrics.ocrbench import OCRBENCH
from tokenpacker.evaluate.metrics.option_letters import MMBENCH, SCIENCEQA, SEED
from tokenpacker.evaluate.metrics.plain_text import ANLS, CONTAINS, EXACT, GQA, RELAXED
from tokenpacker.evaluate.metrics.region_text import IOU, REFCOCO
from tokenpacker.evaluate.metrics.vqa import TEXTVQA, VIZWIZ, VQA
from tokenpacker.evaluate.metrics.yes_or_no import MME, POPE
from tokenpacker.text import did_you_mean

__all__ = ["METRICS", "BenchQuestion", "Metric", "Row", "find_metric"]

MM_VET = Metric(
    name="mm-vet",
    description="scored by GPT-4 on MM-Vet's server; not here",
    rule=lambda answer, question: 0.0,
    summary=mean_score("score"),
    scored_elsewhere=(
        "MM-Vet is scored by GPT-4 and cannot be scored here; write a submission file and give it to MM-Vet's"
        " evaluator (https://github.com/yuweihao/MM-Vet)"
    ),
)
_ALL = (
    EXACT, CONTAINS, VQA, ANLS, RELAXED, IOU,
    GQA, TEXTVQA, VIZWIZ, POPE, MME, MMBENCH, SEED, SCIENCEQA, MMMU, OCRBENCH, REFCOCO, MM_VET,
)  # fmt: skip
METRICS = {metric.name: metric for metric in _ALL}


def find_metric(name: str) -> Metric:
    """The metric of that name.

    Raises:
        ValueError: for an unknown name; the message lists the valid ones.
        ModuleNotFoundError: if it needs a library that is not installed.
    """
    if name not in METRICS:
        raise ValueError(f"metric {name!r} is unknown; use one of: {', '.join(METRICS)}{did_you_mean(name, METRICS)}")
    METRICS[name].require()
    return METRICS[name]
