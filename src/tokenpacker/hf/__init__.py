"""The transformers layer. Importing it registers the model with transformers' Auto classes."""

from tokenpacker.carried import carried_model_path
from tokenpacker.hf.backbone import TokenPackerModel
from tokenpacker.hf.chat import CHAT_FORMATS, LLAVA_SYSTEM, VICUNA_SYSTEM, chat_template
from tokenpacker.hf.checkpoints import convert, export_original, load_released
from tokenpacker.hf.config import TokenPackerConfig
from tokenpacker.hf.image_processor import RELEASED_OPTIONS, TokenPackerImageProcessor
from tokenpacker.hf.model import TokenPackerForConditionalGeneration
from tokenpacker.hf.processor import TokenPackerProcessor
from tokenpacker.hf.quantization import four_bit_config
from tokenpacker.hf.region_setup import add_regions
from tokenpacker.hf.registration import register
from tokenpacker.hf.tokenizer import load_llama_tokenizer

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
    "convert",
    "export_original",
    "four_bit_config",
    "load_llama_tokenizer",
    "load_released",
]
