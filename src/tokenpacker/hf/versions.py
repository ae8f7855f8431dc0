"""Names that differ between the transformers versions that are supported, each said here once."""

from __future__ import annotations

from transformers import PreTrainedModel

RECOMPUTATION = (
    "activation_checkpointing"
    if hasattr(PreTrainedModel, "activation_checkpointing_enable")
    else "gradient_checkpointing"
)
"""Prefix of `TrainingArguments` and of the model's methods that recompute activations in the backward pass."""
