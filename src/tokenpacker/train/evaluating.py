"""Evaluation on the way: a held-out loss, tasks, the best checkpoint, an early end.

transformers' Trainer says when to evaluate and tracks the best checkpoint: `best_metric` and `best_global_step` of its
state. Three of its parts do not fit. Its evaluation loop takes the mean over batches, counts those twice that fill up
the last round of several processes, and draws random numbers. `EarlyStoppingCallback` counts anew in a resumed run, or
takes over the patience of the run before; the log has the count, too. `load_best_model_at_end` allows checkpoints only
at evaluations, and loads the best one also when a signal stops the run.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tokenpacker.data.batches import IDS, only_item
from tokenpacker.data.sources import HeldOut
from tokenpacker.sequence import IGNORED
from tokenpacker.train.callbacks import leave_signals_to_parent, random_numbers_kept
from tokenpacker.train.config import TrainingConfig
from tokenpacker.train.evaluation_config import LOSS
from tokenpacker.train.run_folder import CheckpointError, whole_checkpoints
from tokenpacker.train.task_scores import TaskScore
from tokenpacker.train.trainer import NotFiniteError, PartTrainer

PREFIX = "eval_"  # of the numbers in the log, as transformers and TensorBoard have it


class EvaluatingTrainer(PartTrainer):
    """A PartTrainer that also evaluates. The steps are those of a run without evaluation, bit for bit.

    Args:
        held_out: samples to measure the loss on.
        tasks: to ask.
        asked_by: processor of the questions.
        more: as `PartTrainer`.
    """

    run_config: TrainingConfig
    control: TrainerControl
    train_dataset: Any

    def __init__(
        self,
        config: TrainingConfig,
        model: nn.Module,
        batches: Any,
        arguments: TrainingArguments,
        *,
        held_out: HeldOut | None,
        tasks: Sequence[TaskScore],
        asked_by: Any,
        **more: Any,
    ) -> None:
        super().__init__(config, model, batches, arguments, **more)
        assert config.eval_every is not None, "else a PartTrainer does"
        self.held_out, self.tasks, self.asked_by = held_out, tasks, asked_by
        self.settings = config.evaluation
        self.args.set_evaluate(strategy="steps", steps=config.eval_every, delay=0)
        self.args.metric_for_best_model = PREFIX + self.settings.decided_by
        self.args.greater_is_better = self.settings.decided_by != LOSS

    def run(self, checkpoint: Path | None) -> bool:
        """As `PartTrainer.run`. An early end counts as the end, and `evaluation.final` decides about the weights."""
        if checkpoint is not None:
            self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            if self.stopped_early:  # and was killed before its model was written
                done = self.state.global_step * self.run_config.batches_per_step
                self.train_dataset = Subset(self.train_dataset, range(done))
        has_ended = super().run(checkpoint)
        if has_ended and self.settings.final == "best" and self.state.best_global_step != self.state.global_step:
            self._load_best()
        return has_ended

    @property
    def has_ended(self) -> bool:
        """Whether the run is at its end, or patience is."""
        return super().has_ended or self.stopped_early

    @property
    def stopped_early(self) -> bool:
        """Whether as many evaluations as `patience` says came after the best one."""
        since = [entry for entry in self._evaluations if entry["step"] > (self.state.best_global_step or 0)]
        return self.settings.patience is not None and len(since) >= self.settings.patience

    def evaluated(self) -> dict[str, Any]:
        """All evaluations, and what they decided."""
        best = self.state.best_global_step
        decided = {
            "every": self.run_config.eval_every,
            "decided_by": self.settings.decided_by,
            "best": {
                "step": best,
                "value": self.state.best_metric,
                "checkpoint": self._best_folder.relative_to(self._output).as_posix(),
            },
            "stopped_early": self.stopped_early,
            "model": {"final": self.settings.final, "step": self._final_step},
            "held_out": None if self.held_out is None else dict(self.held_out.facts),
            "questions": {task.name: len(task.questions) for task in self.tasks},
        }
        return {"evaluations": self._evaluations, "evaluation": decided}

    def card_rows(self) -> list[tuple[str, str]]:
        """Rows of the model card."""
        last, seconds = self.state.global_step, sum(entry["eval_seconds"] for entry in self._evaluations)
        which = "the best" if self.settings.final == "best" else "the last"
        ended = f"; stopped early at step {last:,}" if self.stopped_early else ""
        return [
            (
                "evaluated",
                f"{len(self._evaluations)} times, every {self.run_config.eval_every:,} steps, in {seconds:.0f} of the"
                f" seconds{ended}",
            ),
            ("best evaluation", self._best),
            ("this model", f"step {self._final_step:,}, {which}"),
        ]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measures and logs the numbers, each as `eval_NAME`. The training continues as if it had not.

        Raises:
            ValueError: if none of the held-out samples can be used.
            NotFiniteError: if their loss is NaN or infinite.
        """
        start, was_training = time.monotonic(), self.model.training
        metrics: dict[str, float] = {}
        with random_numbers_kept(), self.accelerator.autocast():
            if self.held_out is not None:
                self.bar.note(evaluation=f"measuring {LOSS}")
                metrics[PREFIX + LOSS] = self._held_out_loss(self.held_out)
            model = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
            share = {"process": self.args.process_index, "num_processes": self.args.world_size}
            for task in self.tasks:
                self.bar.note(evaluation=f"asking {task.name}")
                metrics[PREFIX + task.name] = task.measure(model, self.asked_by, **share)
        self.model.train(was_training)
        metrics["eval_seconds"] = round(time.monotonic() - start, 1)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _held_out_loss(self, held_out: HeldOut) -> float:
        """The mean loss of all labelled tokens. Processes take batches in turn."""
        model = (self.model_wrapped if self.is_sharded else self.model).eval()
        size, step = len(held_out.batches), self.args.world_size
        # All call the model equally often, as models need that are spread over processes; what is repeated counts not.
        numbers = range(self.args.process_index, -(-size // step) * step, step)
        loader = DataLoader(
            Subset(held_out.batches, [min(number, size - 1) for number in numbers]),
            collate_fn=only_item,
            num_workers=self.args.dataloader_num_workers,
            worker_init_fn=partial(leave_signals_to_parent, None),
        )
        total, count = 0.0, 0
        for number, batch in zip(numbers, loader, strict=True):
            batch = self._prepare_inputs({key: value for key, value in batch.items() if key != IDS})
            loss = float(model(**batch, **self.forward_options, num_items_in_batch=1).loss)  # the sum over its tokens
            if number < size:
                total, count = total + loss, count + int((batch["labels"][:, 1:] != IGNORED).sum())
        sums = gather_object([(total, count)])
        total, count = sum(loss for loss, _ in sums), sum(tokens for _, tokens in sums)
        if not count:
            raise ValueError("none of the held-out samples can be used; held_out_rejects.jsonl says why")
        if not math.isfinite(total):
            raise NotFiniteError(
                f"the held-out loss after step {self.state.global_step} is {total}; lower optimizer.learning_rate, and"
                f" start another run; {self._last_whole()}"
            )
        return total / count

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Has a new best saved, and ends the run when patience is at its end."""
        is_best = super()._determine_best_metric(metrics=metrics, trial=trial)
        if is_best or self.stopped_early:
            self.control.should_save = True
        found = ", ".join(_written(name, metrics[PREFIX + name]) for name in self.settings.measured)
        self.bar.note(evaluation=f"{found} (best: {self._best})")
        if self.args.should_save:
            print(f"step {self.state.global_step:,}: {found} (best: {self._best})", file=sys.stderr)
        if self.stopped_early:
            self.control.should_training_stop = True
            if self.args.should_save:
                print(f"no new best in {self.settings.patience} evaluations, so the run ends here", file=sys.stderr)
        return is_best

    def _load_best(self) -> None:
        """Gives the model the weights of the best checkpoint. Raises CheckpointError if it is gone or damaged."""
        folder = self._best_folder
        if folder not in whole_checkpoints(folder.parent):
            raise CheckpointError(f"the best checkpoint, {folder}, is gone; give --start and another --output")
        self.state.best_model_checkpoint = str(folder)
        if self.is_sharded:
            self._load_best_model()
        else:
            self._load_from_checkpoint(str(folder))

    @property
    def _evaluations(self) -> list[dict[str, Any]]:
        return [entry for entry in self.state.log_history if self.args.metric_for_best_model in entry]

    @property
    def _best(self) -> str:
        value = _written(self.settings.decided_by, float(self.state.best_metric or 0))
        return f"{value} at step {self.state.best_global_step:,}"

    @property
    def _final_step(self) -> int:
        step = self.state.best_global_step if self.settings.final == "best" else None
        return step or self.state.global_step

    @property
    def _output(self) -> Path:
        return Path(self.args.output_dir).parent

    @property
    def _best_folder(self) -> Path:
        return Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"


def _written(name: str, value: float) -> str:
    return f"{name} {value:.4f}" if name == LOSS else f"{name} {value:.1f}"
