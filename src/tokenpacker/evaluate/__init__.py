"""Evaluation: tasks with exact truth, greedy answers, accuracies with their uncertainty, and split times.

>>> from tokenpacker.evaluate import TASKS
>>> sorted(TASKS)
['easy-vqa', 'fine-print', 'regions', 'regions-boxes', 'regions-shuffled']
"""

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
