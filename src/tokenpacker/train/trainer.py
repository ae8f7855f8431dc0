"""transformers' Trainer with what long runs need: whole checkpoints, exact resumption, no silent NaN, clear errors.

An item of the dataset is one device's batch, and follows from its number alone. Processes take items in turn, so a step
holds the same samples on any number of processes, and a resumed run continues with the next item.
"""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tokenpacker.data.batches import IDS, POSITION, only_item
from tokenpacker.data.rejects import TooManyRejects
from tokenpacker.hf.backbone import TokenPackerModel
from tokenpacker.hf.versions import RECOMPUTATION
from tokenpacker.train.callbacks import (
    ProgressBar,
    StopOnSignal,
    Stopwatch,
    deterministic_on_cpu,
    leave_signals_to_parent,
)
from tokenpacker.train.config import OptimizerConfig, RunConfig
from tokenpacker.train.optimizer import make_optimizer
from tokenpacker.train.run_folder import (
    CHECKPOINTS,
    POSITION_FILE,
    STOPWATCH,
    CheckpointError,
    clear_checkpoint_errors,
    mark_whole,
    remove_checkpoint,
    step_of,
    whole_checkpoints,
)
from tokenpacker.train.scale_distillation import DistillingTrainer, ScaleDistillation

BESIDE_ADAPTER = "beside_adapter.safetensors"  # in a LoRA checkpoint: trained weights outside of the adapter
NOT_FINITE = "not_finite.json"
MIN_LOGGED = 20  # log entries of a short run, so that its loss makes a curve
PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "NCCL", "Broken pipe")  # of gloo and NCCL


class NotFiniteError(ValueError):
    """A loss or gradient is NaN or infinite."""


class WorkerError(ValueError):
    """A process that reads data, or another training process, was killed."""


def training_arguments(config: RunConfig, output: Path, *, num_workers: int) -> TrainingArguments:
    """The Trainer's arguments for a run; making them starts the process group.

    Args:
        num_workers: processes per device that read data.

    Raises:
        ValueError: if the processes cannot share the batches of a step.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if config.batches_per_step % world_size:
        raise ValueError(
            f"batch_size={config.batch_size} is {config.batches_per_step} batches of"
            f" device_batch_size={config.device_batch_size}, which {world_size} processes cannot share; choose another"
            " size or number"
        )
    floor = config.optimizer.min_learning_rate_share
    arguments = TrainingArguments(
        use_cpu=not torch.accelerator.is_available(),  # else processes without a GPU would each train alone
        output_dir=str(output / CHECKPOINTS),
        num_train_epochs=1,  # the dataset holds all epochs, one after the other
        train_sampling_strategy="sequential",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=config.batches_per_step // world_size,
        lr_scheduler_type="cosine_with_min_lr" if floor else "cosine",
        lr_scheduler_kwargs={"min_lr_rate": floor} if floor else None,
        learning_rate=config.optimizer.learning_rate,
        max_grad_norm=config.optimizer.max_grad_norm,
        bf16=config.precision == "bfloat16",
        **{RECOMPUTATION: config.checkpointing, f"{RECOMPUTATION}_kwargs": {"use_reentrant": False}},
        torch_compile=config.compile,
        logging_nan_inf_filter=False,
        save_steps=config.save_every,
        dataloader_num_workers=num_workers,
        dataloader_prefetch_factor=2 if num_workers else None,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        report_to=list(config.report_to) or "none",
        project="tokenpacker",
        run_name=output.resolve().name,
        disable_tqdm=True,
        seed=config.seed,
    )
    if arguments.world_size != world_size:
        raise ValueError(
            f"WORLD_SIZE={world_size} but accelerate made a group of {arguments.world_size}; start the processes with"
            " accelerate launch"
        )
    return arguments


def warmup_steps(config: OptimizerConfig, num_steps: int) -> int:
    """Steps in which the learning rate rises, of a run of `num_steps`."""
    return math.ceil(config.warmup_share * num_steps)


class PartTrainer(DistillingTrainer):
    """A Trainer that trains one model from one dataset of batches, and continues where it was interrupted.

    Args:
        config: the run's settings.
        model: with `requires_grad` set for what is to be trained.
        batches: items are batches of one device, see above.
        arguments: see `training_arguments`.
        processor: is saved with each checkpoint, which is then a model to start from.
        forward_options: arguments of the model's `forward` that are the same for each batch.
        distillation: adds the divergence from the answers at a smaller scale factor to the loss.
        callbacks: further ones.
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        batches: Any,
        arguments: TrainingArguments,
        *,
        processor: Any = None,
        forward_options: Mapping[str, Any] | None = None,
        distillation: ScaleDistillation | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        output = Path(arguments.output_dir).parent
        self.num_steps = len(batches) // config.batches_per_step
        arguments.warmup_steps = warmup_steps(config.optimizer, self.num_steps)
        arguments.logging_steps = max(1, min(config.log_every, self.num_steps // MIN_LOGGED))
        self.stop, self.stopwatch, self.bar = StopOnSignal(), Stopwatch(output / STOPWATCH), ProgressBar(config.name)
        own = [self.stop, self.stopwatch, self.bar]
        super().__init__(
            model=model, args=arguments, train_dataset=batches, data_collator=only_item, callbacks=[*own, *callbacks]
        )
        self.run_config, self.processor, self.forward_options = config, processor, dict(forward_options or {})
        self.distillation = distillation
        self.ids_of_step: list[str] = []
        self.position: dict[str, Any] | None = None
        self.is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        self.remove_callback(PrinterCallback)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback):
                callback.logging_dir = str(output / "tensorboard")  # one curve for all calls of the run
        warn_of_other_engine(self.is_fsdp_enabled, self.is_deepspeed_enabled)
        if self.is_sharded:  # all processes must call the tower equally often
            for module in self.model.modules():
                if isinstance(module, TokenPackerModel):
                    module.vision_chunk_tiles = None

    def run(self, checkpoint: Path | None) -> bool:
        """Trains from a checkpoint, or from the beginning, to the end. Returns False if a signal stopped it before.

        Raises:
            NotFiniteError: if a loss or gradient is NaN or infinite.
            CheckpointError: if a checkpoint cannot be written or read.
            WorkerError: if a process that reads data, or another training process, is killed.
            TooManyRejects: if too much of the data is bad.
        """
        with self.stop, deterministic_on_cpu(), clear_worker_errors():
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if self.has_ended:
            return True
        if self.args.should_save:
            print(
                f"stopped at step {self.state.global_step} of {self.num_steps};"
                f" {whole_checkpoints(Path(self.args.output_dir))[-1]} is kept, and the same command goes on from it",
                file=sys.stderr,
            )
        return False

    @property
    def has_ended(self) -> bool:
        """Whether the run is at its end."""
        return self.state.global_step >= self.num_steps

    def evaluated(self) -> dict[str, Any]:
        """What the history tells of evaluations; nothing without any."""
        return {}

    def card_rows(self) -> list[tuple[str, str]]:
        """Rows of the model card about evaluations."""
        return []

    def write_history(self, path: Path) -> list[dict[str, Any]]:
        """Writes the seconds, the log of each step and the evaluations to a file, and returns the log."""
        steps = [entry for entry in self.state.log_history if "loss" in entry]
        history = {"seconds": self.stopwatch.seconds, "steps": steps, **self.evaluated()}
        path.write_text(json.dumps(history) + "\n")
        return steps

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's dataloader, with workers that end when this process ends and not before."""
        loader = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)  # accelerate iterates over the one that it wraps
        inner.worker_init_fn = partial(leave_signals_to_parent, inner.worker_init_fn)
        return loader

    def _get_num_items_in_batch(self, *args: Any, **kwargs: Any) -> Tensor | int | None:
        count = super()._get_num_items_in_batch(*args, **kwargs)
        return count.clamp(min=1) if isinstance(count, Tensor) else count  # all samples rejected: a loss of 0, no NaN

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that the run's settings name."""
        if self.optimizer is None:
            settings = self.run_config.optimizer
            if self.is_sharded and settings.muon_learning_rate is not None:
                raise ValueError("optimizer.muon_learning_rate needs whole matrices, which FSDP and DeepSpeed divide")
            self.optimizer = make_optimizer(self.model if model is None else model, settings)
        return self.optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The loss of one batch; adds its gradient. Raises NotFiniteError if the loss is NaN or infinite."""
        self.ids_of_step += inputs.pop(IDS, [])
        self.position = inputs.pop(POSITION, None)
        loss = super().training_step(model, inputs | self.forward_options, num_items_in_batch)
        self._require_finite("loss", loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._require_finite("gradient", torch.as_tensor(norm))
        self.ids_of_step = []
        return norm

    def _require_finite(self, what: str, value: Tensor) -> None:
        if bool(torch.isfinite(value).all()):
            return
        step, ids = self.state.global_step + 1, [id for id in self.ids_of_step if id]
        path = Path(self.args.output_dir) / f"{self.args.process_index}-{NOT_FINITE}"
        path.write_text(json.dumps({"step": step, "what": what, "ids": ids}) + "\n")
        raise NotFiniteError(
            f"the {what} of step {step} is {value.item()}; look at its samples, {', '.join(ids[:4])}"
            f"{' ...' if len(ids) > 4 else ''} ({path} has all), or lower optimizer.learning_rate, and start"
            f" another run, from a checkpoint by model.start; {self._last_whole()}"
        )

    def _last_whole(self) -> str:
        whole = whole_checkpoints(Path(self.args.output_dir))
        return f"the last checkpoint, {whole[-1]}, is whole" if whole else "no checkpoint was written yet"

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint, marks it as whole, and only then removes older ones, except for the best."""
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            remove_checkpoint(folder)
        self.accelerator.wait_for_everyone()  # the other processes write into the folder too
        try:
            super()._save_checkpoint(model, trial)
            self._save_beside_model(folder)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                mark_whole(folder)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a full disk as a RuntimeError
            remove_checkpoint(folder)  # makes room on a full disk
            raise CheckpointError(
                f"checkpoint {folder} could not be written ({' '.join(str(error).split())}); {self._last_whole()}:"
                " make room and call the run again"
            ) from error
        if self.args.should_save:
            for old in whole_checkpoints(folder.parent)[: -self.run_config.keep_checkpoints]:
                if step_of(old) != self.state.best_global_step:
                    remove_checkpoint(old)
        self.accelerator.wait_for_everyone()

    def _save_beside_model(self, folder: Path) -> None:
        """Saves the processor, the place in a stream, and in a LoRA run the trained weights outside of the adapter."""
        if not self.args.should_save:
            return
        if self.processor is not None:
            self.processor.save_pretrained(folder)
        if self.position is not None:
            (folder / POSITION_FILE).write_text(json.dumps(self.position) + "\n")
        if self._saves_adapter_only:
            beside = {name: weight.detach().contiguous() for name, weight in self._trained_beside_adapter()}
            save_file(beside, folder / BESIDE_ADAPTER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        with clear_checkpoint_errors(folder):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            if self._saves_adapter_only:
                beside = load_file(folder / BESIDE_ADAPTER)
                self._refuse_gaps({name for name, _ in self._trained_beside_adapter() if name not in beside})
                self.model.load_state_dict(beside, strict=False)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        with clear_checkpoint_errors(Path(checkpoint)):
            for name in () if self.is_sharded else (OPTIMIZER_NAME, SCHEDULER_NAME):
                if not (Path(checkpoint) / name).is_file():  # the Trainer would silently start them anew
                    raise FileNotFoundError(f"{name} is missing")
            super()._load_optimizer_and_scheduler(checkpoint)
        self._take_scheduled_rates()

    def _take_scheduled_rates(self) -> None:
        """Sets the current learning rates. A checkpoint has those of its own schedule, perhaps of a shorter run."""
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # accelerate may have wrapped it
        if not isinstance(scheduler, LambdaLR):  # DeepSpeed has its own
            return
        pairs = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        scheduler._last_lr = [rate * share(scheduler.last_epoch) for rate, share in pairs]
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return super()._load_rng_state(checkpoint)
        with clear_checkpoint_errors(Path(checkpoint)):
            return super()._load_rng_state(checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raises CheckpointError where the Trainer warns: trained weights that are missing would start anew."""
        self._refuse_gaps(set(load_result.missing_keys))

    def _refuse_gaps(self, missing: set[str]) -> None:
        gaps = [name for name, weight in self.model.named_parameters() if weight.requires_grad and name in missing]
        if gaps:
            raise CheckpointError(f"the checkpoint lacks {len(gaps)} trained weights, such as {gaps[0]}; start anew")

    def _trained_beside_adapter(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and weights that a LoRA run trains outside of its adapter, such as the projector."""
        for name, weight in self.model.named_parameters():
            if weight.requires_grad and ".lora_" not in name:
                yield name, weight

    @property
    def _saves_adapter_only(self) -> bool:
        return hasattr(self.model, "peft_config") and not self.is_sharded


@contextmanager
def clear_worker_errors() -> Iterator[None]:
    """Turns errors of other processes into one line; torch gives their traceback, or a number."""
    try:
        yield
    except TooManyRejects as error:
        raise TooManyRejects(str(error).strip().splitlines()[-1].rpartition("TooManyRejects: ")[2]) from None
    except RuntimeError as error:
        told = " ".join(str(error).split())
        if torch.distributed.is_initialized() and any(mark in told for mark in PEER_GONE):
            raise WorkerError(
                f"another process of this run ended ({told[:200]}); its own message says why. Call the run again and it"
                " goes on from its last checkpoint"
            ) from error
        if "DataLoader worker" not in told:
            raise
        raise WorkerError(
            f"a process that reads data was killed ({told}); if memory ran out, lower data.num_workers. Call the run"
            " again and it goes on from its last checkpoint"
        ) from error


def warn_of_other_engine(is_fsdp: bool, is_deepspeed: bool) -> None:
    """Warns if FSDP or DeepSpeed was requested and accelerate silently uses plain DDP, as it does without a GPU."""
    for name, variable, used in (
        ("FSDP", "ACCELERATE_USE_FSDP", is_fsdp),
        ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED", is_deepspeed),
    ):
        if os.environ.get(variable, "").lower() == "true" and not used:
            warnings.warn(
                f"{name} WAS ASKED FOR AND IS NOT USED: accelerate has it on GPUs only. This run is plain DDP, each"
                " process holds the whole model",
                stacklevel=2,
            )
