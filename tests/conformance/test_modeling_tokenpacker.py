"""transformers' common tests of a model, on ours. Shapes: B samples, S sequence length."""

from __future__ import annotations

from functools import partialmethod
from typing import Any
from unittest.mock import patch

import torch

from conformance.upstream import Conformance, common_tests
from tokenpacker.hf import TokenPackerConfig, TokenPackerForConditionalGeneration, TokenPackerModel
from tokenpacker.hf.pretrained import TokenPackerPreTrainedModel

modeling = common_tests("test_modeling_common")
parallelism = common_tests("test_tensor_parallel_mixin")
configuration = common_tests("test_configuration_common")

IMAGE_TOKEN_ID, REGION_TOKEN_ID = 3, 4


class TokenPackerModelTester:
    """Tiny inputs, one tile for each sample; their tests read the attributes."""

    config_class = TokenPackerConfig
    base_model_class = TokenPackerModel
    conditional_generation_class = TokenPackerForConditionalGeneration
    batch_size = 3
    scale_factors = (2, 4, 2)
    num_image_tokens = (4, 1, 4)  # of 4x4 patches
    seq_length = 11
    is_training = True
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    vocab_size = 99
    text_config = {  # noqa: RUF012 - read as an attribute
        "model_type": "llama",
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    vision_config = {  # noqa: RUF012
        "model_type": "clip_vision_model",
        "image_size": 16,
        "patch_size": 4,
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }

    def __init__(self, parent: Any):
        self.parent = parent

    def get_config(self) -> TokenPackerConfig:
        return TokenPackerConfig(
            vision_config=dict(self.vision_config),
            text_config=dict(self.text_config),
            projector_config={"name": "token-packer", "num_heads": 4},
            vision_levels=[1, 2],
            image_token_id=IMAGE_TOKEN_ID,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[TokenPackerConfig, dict[str, Any]]:
        input_ids = modeling.ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 5) + 5  # (B, S)
        for row, count in zip(input_ids, self.num_image_tokens, strict=True):
            row[:count] = IMAGE_TOKEN_ID
        return self.get_config(), {
            "pixel_values": modeling.floats_tensor([self.batch_size, 3, 16, 16]),
            "scale_factors": torch.tensor(self.scale_factors),
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
        }


class TokenPackerModelTest(
    modeling.ModelTesterMixin,
    modeling.GenerationTesterMixin,
    parallelism.TensorParallelTesterMixin,
    Conformance,
):
    all_model_classes = (TokenPackerModel, TokenPackerForConditionalGeneration)
    _is_composite = True
    test_can_init_all_missing_weights_before_2023 = True  # else only files that state a later year are tested

    @property
    def model_tester(self) -> TokenPackerModelTester:
        return TokenPackerModelTester(self)

    def setUp(self) -> None:
        self.config_tester = configuration.ConfigTester(
            self, config_class=TokenPackerConfig, has_text_modality=False, common_properties=["image_token_id"]
        )

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def test_reverse_loading_mapping(self) -> None:
        # It is about saving under old names, which our models do only when asked.
        save_with_old_names = partialmethod(TokenPackerPreTrainedModel.save_pretrained, save_original_format=True)
        with patch.object(TokenPackerPreTrainedModel, "save_pretrained", save_with_old_names):
            super().test_reverse_loading_mapping()


class TokenPackerRegionModelTester(TokenPackerModelTester):
    """One region for each sample beside its tile."""

    def get_config(self) -> TokenPackerConfig:
        config = super().get_config()
        config.set_regions(REGION_TOKEN_ID)
        return config

    def prepare_config_and_inputs_for_common(self) -> tuple[TokenPackerConfig, dict[str, Any]]:
        config, inputs = super().prepare_config_and_inputs_for_common()
        inputs["input_ids"][:, -1] = REGION_TOKEN_ID
        cells = modeling.floats_tensor([self.batch_size, 1, 16])  # (R, P, L)
        return config, inputs | {"region_cells": cells, "region_first_tile": torch.arange(self.batch_size)}


class TokenPackerRegionModelTest(TokenPackerModelTest):
    @property
    def model_tester(self) -> TokenPackerRegionModelTester:
        return TokenPackerRegionModelTester(self)
