"""transformers' Trainer with what training at scale needs: rates per part, checkpoints that are whole, no silent NaN.

One item of the data set is one device's batch, made from (seed, index) alone. Processes take items in turn, so that a
step holds the same samples on any number of them, and a resumed run goes on with the next item.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tokenpacker.data.batches import IDS, POSITION
from tokenpacker.data.rejects import TooManyRejects
from tokenpacker.hf.backbone import TokenPackerModel
from tokenpacker.train.config import OptimizerConfig
from tokenpacker.train.optimizer import MuonAdamW
from tokenpacker.train.saving import (
    POSITION_FILE,
    CheckpointError,
    clear_checkpoint_errors,
    mark_whole,
    remove_checkpoint,
    require_files,
    whole_checkpoints,
)
from tokenpacker.train.signals import leave_signals_to_parent

BESIDE_ADAPTER = "beside_adapter.safetensors"  # what learns in a LoRA run and is no update, such as the projector
NOT_FINITE = "not_finite.json"
# Modules by their names in parameters, and the parts that they are.
PART_MODULES = {
    "vision_tower": "vision_tower",
    "spare_vision_layers": "vision_tower",
    "multi_modal_projector": "projector",
    "region_encoder": "regions",
}
PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "NCCL", "Broken pipe")  # gloo's and NCCL's words


class NotFiniteError(ValueError):
    """A loss or gradient became NaN or infinite."""


class WorkerError(ValueError):
    """A process that reads data, or another one that trains, was killed."""


class PartTrainer(Trainer):
    """A Trainer for a `TokenPackerForConditionalGeneration`.

    Args:
        optimizer_config: rates per part.
        keep_checkpoints: how many whole checkpoints stay.
        processor: is written into checkpoints, so that each is a model to start from; None leaves it out.
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        *args: Any,
        optimizer_config: OptimizerConfig,
        keep_checkpoints: int = 1,
        processor: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.processor = processor
        self.optimizer_config = optimizer_config
        self.keep_checkpoints = keep_checkpoints
        self.ids_of_step: list[str] = []
        self.position: dict[str, Any] | None = None
        warn_of_other_engine(self.is_fsdp_enabled, self.is_deepspeed_enabled)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # all processes must call the tower equally often
            for module in self.model.modules():
                if isinstance(module, TokenPackerModel):
                    module.vision_chunk_tiles = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's. Raises NotFiniteError, CheckpointError, WorkerError, and TooManyRejects with its counts."""
        with clear_worker_errors():
            return super().train(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's, with workers that end when this process does and not before."""
        loader = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)  # accelerate iterates over the one that it wraps
        inner.worker_init_fn = partial(leave_signals_to_parent, inner.worker_init_fn)
        return loader

    def _get_num_items_in_batch(self, *args: Any, **kwargs: Any) -> Tensor | int | None:
        count = super()._get_num_items_in_batch(*args, **kwargs)
        return count.clamp(min=1) if isinstance(count, Tensor) else count  # all samples rejected: a loss of 0, no NaN

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with one group per part that learns; or Muon for matrices and AdamW for the rest."""
        config = self.optimizer_config
        if self.optimizer is None and config.muon_learning_rate is not None:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError("optimizer.muon_learning_rate needs whole matrices, which FSDP and DeepSpeed divide")
            self.optimizer = MuonAdamW(
                self.model if model is None else model,
                learning_rate=config.learning_rate,
                muon_learning_rate=config.muon_learning_rate,
                weight_decay=config.weight_decay,
                betas=config.betas,
            )
        if self.optimizer is None:
            groups = part_groups(self.model if model is None else model, config)
            self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)
        return self.optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The loss of one batch, its gradient added. Raises NotFiniteError when it is none."""
        self.ids_of_step += inputs.pop(IDS, [])
        self.position = inputs.pop(POSITION, None)
        inputs["use_cache"] = False
        inputs["only_learned"] = not self.args.torch_compile  # how many places there are is no shape to compile for
        loss = super().training_step(model, inputs, num_items_in_batch)
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
        """What is left after a failure, as a clause."""
        whole = whole_checkpoints(Path(self.args.output_dir))
        return f"the last checkpoint, {whole[-1]}, is whole" if whole else "no checkpoint was written yet"

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint, marks it as whole, and only then removes older ones."""
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            remove_checkpoint(folder)
        self.accelerator.wait_for_everyone()  # the others write into the folder too, which must not go any more
        try:
            super()._save_checkpoint(model, trial)
            self._save_beside_model(folder)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                mark_whole(folder)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a full disk as a RuntimeError
            remove_checkpoint(folder)  # a full disk may need the room
            raise CheckpointError(
                f"checkpoint {folder} could not be written ({' '.join(str(error).split())}); {self._last_whole()}:"
                " make room and call the run again"
            ) from error
        if self.args.should_save:
            for old in whole_checkpoints(folder.parent)[: -self.keep_checkpoints]:
                remove_checkpoint(old)
        self.accelerator.wait_for_everyone()

    def _save_beside_model(self, folder: Path) -> None:
        """The processor; and in a LoRA run, of which the Trainer saves the updates alone, all else that learns."""
        if not self.args.should_save:
            return
        if self.processor is not None:
            self.processor.save_pretrained(folder)
        if self.position is not None:
            (folder / POSITION_FILE).write_text(json.dumps(self.position) + "\n")
        if not self._keeps_adapter_only():
            return
        learned = {
            name: parameter.detach().contiguous()
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and ".lora_" not in name
        }
        save_file(learned, folder / BESIDE_ADAPTER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        with clear_checkpoint_errors(folder):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            if self._keeps_adapter_only():
                learned = load_file(folder / BESIDE_ADAPTER)
                self._refuse_gaps(learned, lambda name: ".lora_" not in name)
                self.model.load_state_dict(learned, strict=False)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        with clear_checkpoint_errors(Path(checkpoint)):
            if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
                require_files(Path(checkpoint), OPTIMIZER_NAME, SCHEDULER_NAME)  # the Trainer would start them anew
            super()._load_optimizer_and_scheduler(checkpoint)
        self._take_scheduled_rates()

    def _take_scheduled_rates(self) -> None:
        """Sets the rates of the step at hand: a checkpoint has those of its own schedule, perhaps of a shorter run."""
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # accelerate may have wrapped it
        if not isinstance(scheduler, LambdaLR):  # DeepSpeed has one of its own
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
        """A part that learns and is not in the checkpoint would start anew: an error, where the Trainer warns."""
        missing = set(load_result.missing_keys)
        self._refuse_gaps({name for name, _ in self.model.named_parameters() if name not in missing})

    def _refuse_gaps(self, found: Any, concerned: Any = lambda name: True) -> None:
        # A tied weight has its first name only here, and that is the one in the file.
        learning = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        gaps = [name for name in learning if concerned(name) and name not in found]
        if gaps:
            raise CheckpointError(f"the checkpoint lacks {len(gaps)} weights that learn, such as {gaps[0]}; start anew")

    def _keeps_adapter_only(self) -> bool:
        return hasattr(self.model, "peft_config") and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)


def part_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Parameter groups, one for each part with parameters that learn; the head belongs to the language model."""
    by_part: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            by_part.setdefault(part_of(name), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": config.part_learning_rates.get(part, config.learning_rate),
            "weight_decay": config.weight_decay,
            "name": part,
        }
        for part, parameters in by_part.items()
    ]


def part_of(name: str) -> str:
    """The part that a parameter belongs to, by its full name."""
    for module, part in PART_MODULES.items():
        if f".{module}." in f".{name}":
            return part
    return "language_model"


@contextmanager
def clear_worker_errors() -> Iterator[None]:
    """Errors of the processes that read data in one line, where torch hands over their traceback or a number."""
    try:
        yield
    except TooManyRejects as error:
        raise TooManyRejects(str(error).strip().splitlines()[-1].rpartition("TooManyRejects: ")[2]) from None
    except RuntimeError as error:
        if torch.distributed.is_initialized() and any(mark in str(error) for mark in PEER_GONE):
            raise WorkerError(
                f"another process of this run ended ({' '.join(str(error).split())[:200]}); its own message says why."
                " Call the run again and it goes on from its last checkpoint"
            ) from error
        if "DataLoader worker" not in str(error):
            raise
        raise WorkerError(
            f"a process that reads data was killed ({' '.join(str(error).split())}); if memory ran out, lower"
            " data.num_workers. Call the run again and it goes on from its last checkpoint"
        ) from error


def warn_of_other_engine(is_fsdp: bool, is_deepspeed: bool) -> None:
    """Warns where accelerate was asked for an engine and silently took plain DDP, as it does without a GPU."""
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


def count_parameters(model: nn.Module) -> Mapping[str, dict[str, int]]:
    """Per part how many parameters learn and how many are frozen."""
    counts: dict[str, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        part = counts.setdefault(part_of(name), {"trainable": 0, "frozen": 0})
        part["trainable" if parameter.requires_grad else "frozen"] += parameter.numel()
    return counts
