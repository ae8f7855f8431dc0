"""Self-distillation over the scale factor: answers at a larger s learn from the model's own answers at a smaller one.

A projector whose weights serve every scale factor makes teacher and student one model. A step draws the student's s;
the same samples, laid out anew with the tokens of a smaller s, pass the model without a gradient, and the divergence
of the two distributions at each answer token is added to the loss. The teacher's lead grows over the run: at first it
is the next smaller of the run's scale factors, at the end the smallest. The weight rises over the first half.

Source: the progressive schedule follows EPIC's; see `docs/training.md` for what was measured.

Shapes: B rows, S sequence length, S' that of the teacher, N tiles of all rows in order, K answer tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer

from tokenpacker.data.collate import segment_inputs
from tokenpacker.sequence import IGNORED

if TYPE_CHECKING:
    from tokenpacker.hf.configuration import TokenPackerConfig
    from tokenpacker.train.config import TrainingConfig

RAMP = 0.5  # share of the run in which the weight rises from 0
LOGGED = "scale_distillation"  # the divergence in the log, before it is weighted
PADDING = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0}  # no id of text is an image's placeholder


@dataclass(frozen=True, kw_only=True)
class ScaleDistillation:
    """What the loss needs to know of the run and the model.

    Args:
        weight: of the divergence after the ramp.
        num_tokens: packed tokens of a tile by scale factor, the smallest factor first.
        image_token_id: placeholder of a packed token.
    """

    weight: float
    num_tokens: Mapping[int, int]
    image_token_id: int

    @classmethod
    def of_run(cls, run: TrainingConfig, model: TokenPackerConfig) -> ScaleDistillation | None:
        """The settings of a run; None if its weight is 0. Raises ValueError for a projector that is not elastic."""
        if not run.scale_distillation:
            return None
        try:
            counts = {s: model.projector.num_tokens(model.patch_grid, s) for s in sorted(set(run.scale_factors))}
        except ValueError as error:
            raise ValueError(
                f"scale_distillation={run.scale_distillation:g} needs a projector that takes all of scale_factors:"
                f" {error}"
            ) from None
        return cls(weight=run.scale_distillation, num_tokens=counts, image_token_id=model.image_token_id)

    def weight_at(self, progress: float) -> float:
        """The weight after a share of the run."""
        return self.weight * min(1.0, progress / RAMP)

    def teacher_of(self, scale_factor: int, progress: float) -> int | None:
        """The scale factor that this one learns from after a share of the run; None for the smallest."""
        factors = list(self.num_tokens)
        place = factors.index(scale_factor)
        lead = 1 + int(progress * (len(factors) - 1))
        return factors[max(0, place - lead)] if place else None

    def teacher_inputs(self, inputs: Mapping[str, Any], teacher: int) -> dict[str, Any]:
        """The same batch with the image tokens of another scale factor. Tiles and regions are the same tensors."""
        tiles = inputs["tile_index"] if inputs.get("tile_index") is not None else inputs["pixel_values"]
        before, after = (self.num_tokens[factor] for factor in (inputs["scale_factor"], teacher))
        counts = copies(inputs["input_ids"] == self.image_token_id, [before] * len(tiles), [after] * len(tiles))
        return {**inputs, **repeated(inputs, counts), "scale_factor": teacher}


def copies(is_image: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """How often each token (B, S) stands in the sequence in which tile n has after[n] tokens in place of before[n].

    The first token of a tile stands for all of them.
    """
    counts = (~is_image).long()
    firsts = torch.tensor([0, *accumulate(before)][:-1], dtype=torch.long, device=is_image.device)  # among image tokens
    places = is_image.flatten().nonzero()[:, 0][firsts]
    counts.view(-1)[places] = torch.tensor(after, dtype=torch.long, device=is_image.device)
    return counts


def repeated(inputs: Mapping[str, Any], counts: Tensor) -> dict[str, Any]:
    """The text inputs (B, S) of a batch as (B, S'), each token as often as `counts` (B, S) says.

    Takes the three kinds of batches: padded rows, rows of several samples (`data.collate.collate_packed`), and
    questions that share their image (`scenes.conversations.pack`).
    """
    mask = inputs["attention_mask"]
    shares_images = mask.dim() == 4
    lengths = [mask.shape[-1] if shares_images else int(row.nonzero()[-1]) + 1 for row in mask]  # without padding
    sources = [
        torch.arange(length, device=mask.device).repeat_interleave(count[:length])
        for count, length in zip(counts, lengths, strict=True)
    ]  # the place before of each token
    made: dict[str, Any] = {}
    for name, padding in PADDING.items():
        if inputs[name].dim() == 2:
            rows = [row[source] for row, source in zip(inputs[name], sources, strict=True)]
            made[name] = pad_sequence(rows, batch_first=True, padding_value=padding)
    if shares_images:
        return made | _shared(inputs, sources)
    return made if inputs.get("cu_seq_lens_q") is None else made | _packed(inputs, sources, made["labels"].shape[1])


def _packed(inputs: Mapping[str, Any], sources: Sequence[Tensor], width: int) -> dict[str, Any]:
    """Position ids and bounds of rows of several samples; position ids restart in each sample."""
    segments = []
    for positions, source in zip(inputs["position_ids"], sources, strict=True):
        samples = (positions == 0).cumsum(0)[source]  # the sample of each token
        segments.append(samples.unique_consecutive(return_counts=True)[1].tolist())
    device = inputs["position_ids"].device
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in segment_inputs(segments, width).items()
    }


def _shared(inputs: Mapping[str, Any], sources: Sequence[Tensor]) -> dict[str, Tensor]:
    """Position ids and mask of rows in which all images come first, and each conversation goes on from there."""
    before, positions = inputs["attention_mask"], inputs["position_ids"]
    width = max(map(len, sources))
    mask = before.new_full((len(sources), 1, width, width), torch.finfo(before.dtype).min)
    places = positions.new_zeros(len(sources), width)
    for row, source in enumerate(sources):
        new = torch.arange(len(source), device=source.device)
        mask[row, 0, : len(new), : len(new)] = before[row, 0][source][:, source].masked_fill(
            new[:, None] < new, torch.finfo(before.dtype).min
        )
        old = positions[row, source]
        grown = len(new) - before.shape[-1]
        places[row, : len(new)] = torch.where(old == source, new, old + grown)
    return {"attention_mask": mask, "position_ids": places}


class DistillingTrainer(Trainer):
    """A Trainer whose loss has the divergence from the answers at a smaller scale factor, if `distillation` is set."""

    distillation: ScaleDistillation | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._divergences: dict[int, Tensor] = {}  # by step, since the last entry of the log

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of the batch, with the divergence over as many items as the cross entropy."""
        settings, progress = self.distillation, self.state.global_step / max(1, self.state.max_steps)
        teacher = None if settings is None else settings.teacher_of(inputs["scale_factor"], progress)
        if settings is None or teacher is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with torch.no_grad():
            taught = model(**settings.teacher_inputs(inputs, teacher)).logits  # (K, V)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        soft = divergence(outputs.logits, taught) / (len(taught) if num_items_in_batch is None else num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            soft = soft * self.accelerator.num_processes  # as the Trainer does: gradients are averaged over processes
        step = self.state.global_step
        self._divergences[step] = self._divergences.get(step, torch.zeros_like(soft)) + soft.detach()
        loss = loss + settings.weight_at(progress) * soft
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs the divergence beside the loss, before its weight: the mean over the steps that had a teacher."""
        if self._divergences and "loss" in logs:
            mean = torch.stack(list(self._divergences.values())).mean()
            logs[LOGGED] = self.accelerator.gather(mean).mean().item()
            self._divergences.clear()
        super().log(logs, start_time)


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the student's distributions from the teacher's (K, V), summed, in float32."""
    target = teacher.detach().float().log_softmax(dim=-1)
    return F.kl_div(student.float().log_softmax(dim=-1), target, reduction="sum", log_target=True)
