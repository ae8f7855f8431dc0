"""What every model class here inherits: how it is loaded, saved and initialised, in the manner of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.llava.modeling_llava import LlavaPreTrainedModel

from tokenpacker import projectors
from tokenpacker.hf.configuration import TokenPackerConfig
from tokenpacker.hf.outputs import CACHE
from tokenpacker.regions import RegionEncoder

OWN_MODULES = (projectors.Projector, RegionEncoder)  # of the core, which initialise themselves

OLD_NAMES = (r"(?<!\w)projector\.", "multi_modal_projector.")
"""A part's name in models saved by version 0.1.0, as a pattern, and its name now."""
register_checkpoint_conversion_mapping(TokenPackerConfig.model_type, [WeightRenaming(*OLD_NAMES)], overwrite=True)


class TokenPackerPreTrainedModel(LlavaPreTrainedModel):
    """Loading and saving; capabilities are LLaVA's."""

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
        """False: transformers then initialises missing weights of the parts as the parts do."""
        return False

    def save_pretrained(self, *args: Any, save_original_format: bool = False, **kwargs: Any) -> None:
        """As of every model in transformers, but weights keep the names that they have in the module.

        Models that were saved under older names (`OLD_NAMES`) load all the same.
        """
        super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, OWN_MODULES):
            module.init_weights()
        else:
            super()._init_weights(module)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # transformers passes over modules of other packages that have no parameters of their own: over most of ours
        if isinstance(module, OWN_MODULES):
            is_custom_code = all(getattr(weight, "_is_hf_initialized", False) for weight in module.parameters())
        super()._initialize_weights(module, is_custom_code)
