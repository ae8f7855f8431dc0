"""Evaluation: tasks with exact truth, greedy answers, accuracies with their uncertainty, and split times.

>>> from tokenpacker.evaluate import TASKS
>>> sorted(TASKS)
['easy-vqa', 'fine-print', 'regions', 'regions-boxes', 'regions-shuffled']

Importing this loads nothing; the first use of a public name loads what that needs. So the command line can refuse an
unknown task at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenpacker.evaluate.measure import measure_model
    from tokenpacker.evaluate.run import evaluate
    from tokenpacker.evaluate.score import Answer, Score, TaskResult
    from tokenpacker.evaluate.speed import Setting, Speed, measure_speed
    from tokenpacker.evaluate.tasks import TASKS, Task, find_task, normalize_answer

__all__ = [
    "TASKS",
    "Answer",
    "Score",
    "Setting",
    "Speed",
    "Task",
    "TaskResult",
    "evaluate",
    "find_task",
    "measure_model",
    "measure_speed",
    "normalize_answer",
]

# module -> the public names that it defines
_PUBLIC = {
    "measure": {"measure_model"},
    "run": {"evaluate"},
    "score": {"Answer", "Score", "TaskResult"},
    "speed": {"Setting", "Speed", "measure_speed"},
    "tasks": {"TASKS", "Task", "find_task", "normalize_answer"},
}


def __getattr__(name: str) -> Any:
    for module, names in _PUBLIC.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
