"""The model under vLLM: vision tower and projector as everywhere, the language model vLLM's own.

A subclass of vLLM's `TransformersMultiModalForCausalLM` was measured beside it: same tokens, same speed. But it wraps
transformers' class of the language model for the whole process, which then cannot load another one, and puts vLLM's
layers into tower and projector, whose weights it may empty on a CPU.

Shapes: N tiles of all images in order, (h, w) tile size, T packed tokens of a tile, D language width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokenpacker import projectors
from tokenpacker.hf import TokenPackerConfig, TokenPackerModel
from tokenpacker.hf.vision_encoder import build_vision_tower, encode_tiles
from tokenpacker.plugins.vllm_images import ImageInfo, ImageProcessor, LargestImages
from tokenpacker.projectors.base import pack_tiles

NEVER_USED = re.compile(r"vision_tower\..*(head|post_layernorm)\.")  # saved models may lack them


@MULTIMODAL_REGISTRY.register_processor(ImageProcessor, info=ImageInfo, dummy_inputs=LargestImages)
class TokenPackerForVLLM(nn.Module, SupportsMultiModal, SupportsLoRA, SupportsPP):
    """`TokenPackerForConditionalGeneration` for vLLM."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.spare_vision_layers.": None,
            "model.region_encoder.": None,
            "model.projector.": "multi_modal_projector.",  # as version 0.1.0 named it
            "model.language_model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
            "model.": "",
        }
    )
    packed_modules_mapping = {  # noqa: RUF012 - vLLM's convention
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config: TokenPackerConfig = vllm_config.model_config.hf_config
        self.config, dtype = config, vllm_config.model_config.dtype
        with self._mark_tower_model(vllm_config, "image"):  # type: ignore[operator]
            self.vision_tower = build_vision_tower(config).to(dtype).requires_grad_(False).eval()
            self.multi_modal_projector = projectors.build(config.projector).to(dtype).eval()
        text = config.text_config
        with self._mark_language_model(vllm_config):  # type: ignore[operator]
            self.language_model = init_vllm_registered_model(
                vllm_config,
                hf_config=text,
                architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]],  # a converted config has another
                prefix=maybe_prefix(prefix, "language_model"),
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """The mark of an image in a prompt."""
        return "<image>"

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        """The packed tokens of each image, (sum of T, D), from `pixel_values` (N, 3, h, w)."""
        if kwargs.get("pixel_values") is None:
            return []
        config, factors = self.config, kwargs.get("scale_factors")
        features = encode_tiles(
            self.vision_tower,
            kwargs["pixel_values"],
            config.patch_grid,
            config.vision_levels,
            config.vision_query_level,
            TokenPackerModel.vision_chunk_tiles,
        )[0]
        packed = pack_tiles(self.multi_modal_projector, features, None if factors is None else factors.tolist())
        ends = [0, *kwargs["num_tiles"].flatten().cumsum(0).tolist()]
        return [torch.cat(list(packed[start:end])) for start, end in pairwise(ends)]

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states of the language model."""
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """The language model's logits."""
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads a saved model, and returns the names of the weights that need no more loading."""
        # A saved tower may have layers above the last one that is used.
        loader = AutoWeightsLoader(self, ignore_unexpected_prefixes=["vision_tower."])
        loaded = loader.load_weights(weights, mapper=self.hf_to_vllm_mapper)
        return loaded | {name for name, _ in self.named_parameters() if NEVER_USED.match(name)}

    def get_mm_mapping(self) -> MultiModelKeys:
        """The names of the parts."""
        return MultiModelKeys.from_string_field(
            language_model="language_model", connector="multi_modal_projector", tower_model="vision_tower"
        )
