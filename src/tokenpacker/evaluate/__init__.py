"""Evaluation: tasks with exact truth, greedy answers, and accuracies with their uncertainty.

>>> from tokenpacker.evaluate import TASKS
>>> sorted(TASKS)
['easy-vqa', 'fine-print', 'regions', 'regions-boxes', 'regions-shuffled']
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenpacker.evaluate.evaluation import evaluate
    from tokenpacker.evaluate.measure import measure_model
    from tokenpacker.evaluate.score import Answer, Score, TaskResult
    from tokenpacker.evaluate.tasks import TASKS, Task, find_task, normalize_answer

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

# module -> the public names that it defines. Metrics and protocols need no torch, which the tasks import; an unknown
# task is refused before transformers is imported, which takes seconds.
_PUBLIC = {
    "evaluation": {"evaluate"},
    "measure": {"measure_model"},
    "score": {"Answer", "Score", "TaskResult"},
    "tasks": {"TASKS", "Task", "find_task", "normalize_answer"},
}


def __getattr__(name: str) -> Any:
    for module, names in _PUBLIC.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
