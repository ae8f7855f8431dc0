"""The transformers layer. Importing it registers the model with transformers' Auto classes."""

from importlib import import_module
from typing import Any

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
from tokenpacker.hf.pretrained import four_bit_config
from tokenpacker.hf.processing.chat import CHAT_FORMATS, LLAVA_SYSTEM, VICUNA_SYSTEM, chat_template
from tokenpacker.hf.processing.image_processor import RELEASED_OPTIONS, TokenPackerImageProcessor
from tokenpacker.hf.processing.llama_tokenizer import ReleasedLlamaTokenizer, load_llama_tokenizer
from tokenpacker.hf.processing.processor import TokenPackerProcessor
from tokenpacker.hf.regions.region_setup import add_regions
from tokenpacker.hub import carried_model_path


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
    # Tables of class names, which transformers' own `register` does not fill. `transformers serve`, pipelines and the
    # model card look the kind of a model up there.
    for table, model_class in (
        (modeling_auto.MODEL_MAPPING_NAMES, TokenPackerModel),
        (modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, TokenPackerForConditionalGeneration),
        (modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, TokenPackerForConditionalGeneration),
    ):
        table[TokenPackerConfig.model_type] = model_class.__name__


register()


def __getattr__(name: str) -> Any:
    """Finds what version 0.1.0 had here: it imported the readers of released checkpoints, which import this package."""
    if name in ("convert", "export_original", "load_released"):
        return getattr(import_module("tokenpacker.checkpoints"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CHAT_FORMATS",
    "LLAVA_SYSTEM",
    "RELEASED_OPTIONS",
    "VICUNA_SYSTEM",
    "TokenPackerConfig",
    "TokenPackerForConditionalGeneration",
    "TokenPackerImageProcessor",
    "TokenPackerModel",
    "TokenPackerProcessor",
    "add_regions",
    "carried_model_path",
    "chat_template",
    "four_bit_config",
    "load_llama_tokenizer",
]
