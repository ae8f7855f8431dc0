"""Every name that differs between the supported transformers versions, 5.16.1 to 5.24."""

from __future__ import annotations

import warnings

import transformers
from packaging import version
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llava.modeling_llava import LlavaModelOutputWithPast

CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""Name of the key/value cache among the arguments and outputs of models: `cache` from transformers 5.24 on."""

HAS_IMAGE_OUTPUTS = "image_outputs" in LlavaModelOutputWithPast.__dataclass_fields__
"""Whether LLaVA's outputs hold the whole `image_outputs`, as from 5.24 on, or `image_hidden_states` alone."""

RECOMPUTATION = (
    "activation_checkpointing"
    if hasattr(PreTrainedModel, "activation_checkpointing_enable")
    else "gradient_checkpointing"
)
"""Prefix of `TrainingArguments` and of the model's methods that recompute activations in the backward pass."""

_IS_5_24 = version.parse(transformers.__version__) >= version.parse("5.24")

SELECTS_HIDDEN_STATES = _IS_5_24
"""Whether `output_hidden_states` takes indices. Older versions count them otherwise, or keep all states anyway."""

PREFILLS_IMAGES_IN_CHUNKS = _IS_5_24
"""Whether `prefill_chunk_size` keeps the images of a prompt."""


def cache_argument(cache: Cache | None, past_key_values: Cache | None) -> dict[str, Cache | None]:
    """The cache as a keyword argument of the language model.

    Raises:
        ValueError: for a cache under both names.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("the cache was given as cache and as past_key_values; pass it once")
    if past_key_values is not None and CACHE == "cache":
        warnings.warn("`past_key_values` is deprecated in transformers; use `cache`", FutureWarning, stacklevel=2)
    return {CACHE: past_key_values if cache is None else cache}


HAS_EXPORTERS = _IS_5_24
"""Whether `transformers.exporters` has the exporters, quantizers and graph inputs that `tokenpacker.export` uses."""
