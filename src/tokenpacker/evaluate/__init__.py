"""Evaluation: tasks with exact truth, greedy answers, and accuracies with their uncertainty.

>>> from tokenpacker.evaluate import TASKS
>>> sorted(TASKS)
['easy-vqa', 'fine-print', 'regions', 'regions-boxes', 'regions-shuffled']
"""

from typing import TYPE_CHECKING, Any

from tokenpacker.evaluate.score import Answer, Score, TaskResult
from tokenpacker.evaluate.tasks import TASKS, Task, find_task, normalize_answer

if TYPE_CHECKING:
    from tokenpacker.evaluate.evaluation import evaluate
    from tokenpacker.evaluate.measure import measure_model

__all__ = [
    "TASKS",
    "Answer",
    "Score",
    "Task",
    "TaskResult",
    "evaluate",
    "find_task",
    "measure_model",
    "normalize_answer",
]


def __getattr__(name: str) -> Any:
    # Both import transformers, which takes seconds; the command line refuses an unknown task before.
    if name == "evaluate":
        from tokenpacker.evaluate.evaluation import evaluate

        return evaluate
    if name == "measure_model":
        from tokenpacker.evaluate.measure import measure_model

        return measure_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
