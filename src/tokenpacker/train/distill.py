"""Distillation: a model also learns how probable a finished one finds each token of the same answers.

Shapes: K learned tokens, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenpacker.hf.model import TokenPackerForConditionalGeneration

TEACHER = "teacher_"  # begins the keys of a batch that are for the teacher


class Teacher:
    """A finished model that reads the same images with tokens of its own.

    Args:
        folder: of a model.
        share: of the loss that comes from it; the rest comes from the labels.
    """

    def __init__(self, folder: str | Path, share: float):
        self.model = TokenPackerForConditionalGeneration.from_pretrained(folder).eval().requires_grad_(False)
        self.share = share

    def blend(self, loss: Tensor, logits: Tensor, inputs: dict[str, Tensor], pixel_values: Tensor) -> Tensor:
        """The loss to learn from: the labels' `loss` and the divergence of logits (K, V) from the teacher's.

        Args:
            inputs: ids, labels, positions and mask with as many image tokens as the teacher has.
        """
        with torch.no_grad():
            known = self.model(**inputs, pixel_values=pixel_values, only_learned=True, use_cache=False).logits
        divergence = F.kl_div(logits.log_softmax(-1), known.log_softmax(-1), log_target=True, reduction="batchmean")
        return (1 - self.share) * loss + self.share * divergence


def split_teacher(inputs: dict[str, Any]) -> dict[str, Any]:
    """The teacher's part of a batch, taken out of it."""
    return {key.removeprefix(TEACHER): inputs.pop(key) for key in list(inputs) if key.startswith(TEACHER)}
