"""Makes transformers know the model's classes: its Auto classes, and its tables of class names."""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.models.auto import modeling_auto

# By its full path: transformers 5.16 hides the public name where torchvision is missing.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tokenpacker.hf.backbone import TokenPackerModel
from tokenpacker.hf.configuration import TokenPackerConfig
from tokenpacker.hf.model import TokenPackerForConditionalGeneration
from tokenpacker.hf.processing.image_processor import TokenPackerImageProcessor
from tokenpacker.hf.processing.llama_tokenizer import ReleasedLlamaTokenizer
from tokenpacker.hf.processing.processor import TokenPackerProcessor

CLASS_NAMES = {
    "MODEL_MAPPING_NAMES": TokenPackerModel.__name__,
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": TokenPackerForConditionalGeneration.__name__,
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES": TokenPackerForConditionalGeneration.__name__,
}
"""transformers' tables of class names, which its own `register` does not fill: `transformers serve`, pipelines and the
model card read from them what a model is."""


def register() -> None:
    """Registers the model with transformers. A second call changes nothing."""
    AutoConfig.register(TokenPackerConfig.model_type, TokenPackerConfig, exist_ok=True)
    AutoModel.register(TokenPackerConfig, TokenPackerModel, exist_ok=True)
    for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto_class.register(TokenPackerConfig, TokenPackerForConditionalGeneration, exist_ok=True)
    AutoImageProcessor.register(
        TokenPackerConfig,
        slow_image_processor_class=TokenPackerImageProcessor,
        fast_image_processor_class=TokenPackerImageProcessor,
        exist_ok=True,
    )
    AutoTokenizer.register(TokenPackerConfig, fast_tokenizer_class=ReleasedLlamaTokenizer, exist_ok=True)
    AutoProcessor.register(TokenPackerConfig, TokenPackerProcessor, exist_ok=True)
    for table, class_name in CLASS_NAMES.items():
        getattr(modeling_auto, table)[TokenPackerConfig.model_type] = class_name
