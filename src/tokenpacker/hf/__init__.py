"""The transformers layer. Importing it registers the model with transformers' Auto classes."""

from tokenpacker.hf.backbone import TokenPackerModel
from tokenpacker.hf.configuration import TokenPackerConfig
from tokenpacker.hf.model import TokenPackerForConditionalGeneration
from tokenpacker.hf.processing.chat import CHAT_FORMATS, LLAVA_SYSTEM, VICUNA_SYSTEM, chat_template
from tokenpacker.hf.processing.image_processor import RELEASED_OPTIONS, TokenPackerImageProcessor
from tokenpacker.hf.processing.llama_tokenizer import load_llama_tokenizer
from tokenpacker.hf.processing.processor import TokenPackerProcessor
from tokenpacker.hf.quantization import four_bit_config
from tokenpacker.hf.regions.region_setup import add_regions
from tokenpacker.hf.registration import register
from tokenpacker.known_models import carried_model_path

register()

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
