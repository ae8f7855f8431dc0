"""What every model class here inherits: how it is loaded, saved and initialised, in the manner of transformers."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from tokenpacker import projectors
from tokenpacker.hf.config import TokenPackerConfig
from tokenpacker.hf.outputs import CACHE
from tokenpacker.regions import RegionEncoder

OWN_MODULES = (projectors.Projector, RegionEncoder)  # of the core, which initialise themselves


class TokenPackerPreTrainedModel(PreTrainedModel):
    """Loading, saving and the capabilities that the parts inherit from transformers."""

    config_class = TokenPackerConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = [CACHE]  # noqa: RUF012 - transformers' convention
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: TokenPackerConfig):
        super().__init__(config)
        unused = range(config.num_vision_layers, config.vision_config.num_hidden_layers)
        head_and_norm = r"vision_tower\..*(head|post_layernorm)\."
        self._keys_to_ignore_on_load_unexpected = [
            head_and_norm,
            *(rf"vision_tower\..*layers?\.{layer}\." for layer in unused),
        ]

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
