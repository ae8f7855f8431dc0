"""Prompts to token ids under vLLM, exactly as `TokenPackerProcessor` makes them.

vLLM tokenizes a prompt before it looks for images. A tokenizer alone would add a second start token to what a chat
template wrote, and cannot give the ids that released weights were trained with; see `encode_as_trained`.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import AutoTokenizer
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.renderers.registry import RENDERER_REGISTRY
from vllm.tokenizers import TokenizerRegistry
from vllm.tokenizers.hf import get_cached_tokenizer

from tokenpacker.hf.processing.prompts import ImageTokens, encode_prompts

MODE = "tokenpacker"


def register_tokenizer() -> None:
    """Registers the tokenizer mode `tokenpacker` with vLLM."""
    if MODE not in TokenizerRegistry.tokenizers:
        TokenizerRegistry.register(MODE, __name__, "ExactTokenizer")
        RENDERER_REGISTRY.register(MODE, "vllm.renderers.hf", "HfRenderer")


class TokenizerChoice(VerifyAndUpdateConfig):
    """Chooses the tokenizer mode for the model's architecture, as vLLM does for its own models."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Sets the tokenizer mode unless the user has chosen one."""
        if model_config.tokenizer_mode == "auto":
            model_config.tokenizer_mode = MODE


class ExactTokenizer:
    """What vLLM loads for the mode."""

    @classmethod
    def from_pretrained(cls, *args: Any, download_dir: str | None = None, **kwargs: Any) -> Any:
        """The model's tokenizer, which encodes prompts as the processor does."""
        return get_cached_tokenizer(exact(AutoTokenizer.from_pretrained(*args, cache_dir=download_dir, **kwargs)))


def exact(tokenizer: Any, mark: str = "<image>") -> Any:
    """A copy of the tokenizer that encodes prompts as the processor does; `mark` stands for an image and is kept."""
    mark_id = tokenizer.convert_tokens_to_ids(mark)

    class Exact(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, text: Any, **options: Any) -> Any:
            prompts = [text] if isinstance(text, str) else list(text)
            kept = ImageTokens([mark_id], [mark])
            images = [[kept] * prompt.count(mark) for prompt in prompts]
            data = encode_prompts(tokenizer, prompts, images, mark_id, {"padding": False, **options})
            del data["mm_token_type_ids"]
            return {name: rows[0] for name, rows in data.items()} if isinstance(text, str) else data

        def encode(self, text: str, **options: Any) -> list[int]:
            return self(text, **options)["input_ids"]

        def __reduce__(self) -> Any:
            return exact, (tokenizer, mark)

    Exact.__name__ = f"Exact{type(tokenizer).__name__}"
    copied = copy.copy(tokenizer)
    copied.__class__ = Exact
    return copied
