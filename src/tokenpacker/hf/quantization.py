"""Weights in four bits, so that a 13B model fits a 24 GB GPU."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BitsAndBytesConfig

# By their full names: bitsandbytes would quantise a projector that is only called `projector` in silence.
KEPT_WHOLE = (
    "model.vision_tower",
    "model.spare_vision_layers",
    "model.multi_modal_projector",
    "model.region_encoder",
    "lm_head",
)


def four_bit_config(compute_dtype: torch.dtype = torch.bfloat16, **options: Any) -> BitsAndBytesConfig:
    """`quantization_config` for `from_pretrained`: the language model's layers in NF4, all else as it is.

    The vision tower and the projector are a twentieth of the weights, and every image goes through them.

    Args:
        options: further arguments of `BitsAndBytesConfig`.
    """
    given = {"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": list(KEPT_WHOLE)} | options
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute_dtype, **given)
