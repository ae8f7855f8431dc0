"""How the model classes are initialised, loaded and saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.llava.modeling_llava import LlavaPreTrainedModel

from tokenpacker import projectors
from tokenpacker.hf.configuration import TokenPackerConfig
from tokenpacker.hf.versions import CACHE
from tokenpacker.projectors.folded import FoldedTokenPacker
from tokenpacker.regions import RegionEncoder

OLD_NAMES = (r"(?<!\w)projector\.", "multi_modal_projector.")
"""A part's name in models saved by version 0.1.0, as a pattern, and its name now."""
register_checkpoint_conversion_mapping(TokenPackerConfig.model_type, [WeightRenaming(*OLD_NAMES)], overwrite=True)

KEPT_WHOLE = (
    "model.vision_tower",
    "model.spare_vision_layers",
    "model.multi_modal_projector",
    "model.region_encoder",
    "lm_head",
)
"""Parts that are not quantised. The names are full: bitsandbytes would silently quantise a part called `projector`."""


class TokenPackerPreTrainedModel(LlavaPreTrainedModel):
    """Base class of the models; capabilities are LLaVA's."""

    config_class = TokenPackerConfig
    config: TokenPackerConfig
    main_input_name = "input_ids"
    _skip_keys_device_placement = [CACHE]  # noqa: RUF012 - transformers' convention

    def __init__(self, config: TokenPackerConfig):
        PreTrainedModel.__init__(self, config)  # not LLaVA's, which would build its own parts
        unused = range(config.num_vision_layers, config.vision_config.num_hidden_layers)
        head_and_norm = r"vision_tower\..*(head|post_layernorm)\."
        self._keys_to_ignore_on_load_unexpected = [
            head_and_norm,
            *(rf"vision_tower\..*layers?\.{layer}\." for layer in unused),
        ]

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, so that transformers passes missing weights to `_init_weights`."""
        return False

    def save_pretrained(self, *args: Any, save_original_format: bool = False, **kwargs: Any) -> None:
        """Saves as any model of transformers does, but under the names that the weights have in the module.

        Models that were saved under older names (`OLD_NAMES`) still load.

        Raises:
            ValueError: for a model with a folded projector, which would load with new weights.
        """
        if any(isinstance(module, FoldedTokenPacker) for module in self.modules()):
            raise ValueError("the projector is folded; save the model before folding, or put its own projector back")
        super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, (projectors.Projector, RegionEncoder)):
            super()._init_weights(module)
        elif not all(getattr(weight, "_is_hf_initialized", False) for weight in module.parameters()):
            module.init_weights()  # a loaded part is left alone: its `init_weights` may write in place


def four_bit_config(compute_dtype: torch.dtype = torch.bfloat16, **options: Any) -> BitsAndBytesConfig:
    """`quantization_config` for `from_pretrained`: the language model's layers in NF4, so that 13B fits a 24 GB GPU.

    The vision tower and the projector keep their type. They are a twentieth of the weights, and every image goes
    through them.

    Args:
        options: further arguments of `BitsAndBytesConfig`.
    """
    given = {"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": list(KEPT_WHOLE)} | options
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute_dtype, **given)
