"""The transformers layer. Importing it registers the model with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

# By its full path: transformers 5.16 hides the public name where torchvision is missing.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

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
from tokenpacker.hf.tokenizer import ReleasedLlamaTokenizer, load_llama_tokenizer

AutoConfig.register(TokenPackerConfig.model_type, TokenPackerConfig, exist_ok=True)
AutoModel.register(TokenPackerConfig, TokenPackerModel, exist_ok=True)
AutoModelForImageTextToText.register(TokenPackerConfig, TokenPackerForConditionalGeneration, exist_ok=True)
AutoImageProcessor.register(
    TokenPackerConfig,
    slow_image_processor_class=TokenPackerImageProcessor,
    fast_image_processor_class=TokenPackerImageProcessor,
    exist_ok=True,
)
AutoTokenizer.register(TokenPackerConfig, fast_tokenizer_class=ReleasedLlamaTokenizer, exist_ok=True)
AutoProcessor.register(TokenPackerConfig, TokenPackerProcessor, exist_ok=True)

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
