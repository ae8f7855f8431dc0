"""transformers' common tests of a processor, on ours."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from conformance.upstream import Conformance, common_tests
from conftest import byte_tokenizer
from tokenpacker.hf import TokenPackerImageProcessor, TokenPackerProcessor

processing = common_tests("test_processing_common")


class TokenPackerProcessorTest(processing.ProcessorTesterMixin, Conformance):
    processor_class = TokenPackerProcessor
    # A byte is a token here, so that their lengths are too short for their texts.
    images_text_kwargs_max_length = 217
    images_text_kwargs_override_max_length = 212
    images_unstructured_max_length = 176
    image_text_kwargs_max_length = 217  # as transformers before 5.24 call it
    image_text_kwargs_override_max_length = 212
    image_unstructured_max_length = 176

    @classmethod
    def _setup_tokenizer(cls) -> PreTrainedTokenizerBase:
        return byte_tokenizer()

    @classmethod
    def _setup_image_processor(cls) -> TokenPackerImageProcessor:
        return TokenPackerImageProcessor(image_mode="pad", tile_size=(32, 32))

    @staticmethod
    def prepare_processor_dict() -> dict[str, Any]:
        projector = {"name": "token-packer", "vision_dim": 32, "language_dim": 32, "num_heads": 4}
        return {"patch_grid": [8, 8], "projector_config": projector}
