"""The settings of evaluation during a run: what is measured, which checkpoint is best, and when a run ends early."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, PositiveInt
from pydantic.dataclasses import dataclass

CHECKED = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)  # strict: no `true` for 1, no "3" for 3
LOSS = "loss"  # name of the loss on held-out samples
OWN_TASK = ".jsonl"  # ending of a task of your own


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class EvaluationConfig:
    """What is measured every `eval_every` steps, and what follows from it.

    Args:
        held_out: data file whose loss is measured and that is not trained on.
        held_out_images: folder that its image paths are relative to. None takes `data.images`.
        held_out_share: share of the training samples to hold out, in place of a file. They are drawn one by one with
            the run's `seed`, so another sample may show the same image.
        tasks: names of tasks of `tokenpacker evaluate`, or JSONL files of your own.
        metric: of your own tasks. None takes exact match.
        limit: questions of each task, drawn at random, the same ones each time. None asks all.
        batch_size: questions that a device answers at once, rounded up to whole images.
        best_by: the number that decides which checkpoint is best: `loss`, or the name of a task. None takes the loss
            if it is measured, otherwise the first task.
        patience: a run ends early after so many evaluations in a row without a new best. None never ends it early.
        final: the checkpoint that becomes the model of the finished run.
    """

    held_out: str | None = None
    held_out_images: str | None = None
    held_out_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    tasks: tuple[str, ...] = ()
    metric: str | None = None
    limit: PositiveInt | None = 500
    batch_size: PositiveInt = 16
    best_by: str | None = None
    patience: PositiveInt | None = None
    final: Literal["last", "best"] = "last"

    def __post_init__(self) -> None:
        if self.held_out is not None and self.held_out_share:
            raise ValueError("evaluation.held_out and evaluation.held_out_share exclude each other; leave one out")
        if self.held_out is None and self.held_out_images is not None:
            raise ValueError("evaluation.held_out_images belongs to evaluation.held_out, which is missing; give both")
        if self.metric is not None and not any(task.endswith(OWN_TASK) for task in self.tasks):
            raise ValueError(f"evaluation.metric={self.metric} belongs to your own tasks; name a {OWN_TASK} file")
        if len(set(self.measured)) < len(self.measured) or LOSS in map(task_name, self.tasks):
            raise ValueError(
                f"evaluation.tasks={', '.join(self.tasks)} must all have other names, and none of them {LOSS!r};"
                " rename a file"
            )
        if self.best_by is not None and self.best_by not in self.measured:
            known = ", ".join(self.measured) or "a held-out loss or a task, which are both missing"
            raise ValueError(f"evaluation.best_by={self.best_by!r} is not measured; use one of: {known}")

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of the numbers that are measured, the loss first."""
        loss = (LOSS,) if self.held_out is not None or self.held_out_share else ()
        return loss + tuple(map(task_name, self.tasks))

    @property
    def decided_by(self) -> str:
        """Name of the number that decides which checkpoint is best."""
        return self.best_by or self.measured[0]


def task_name(task: str) -> str:
    """The name of a task's number. A file has its own name without the ending."""
    return Path(task).stem if task.endswith(OWN_TASK) else task
