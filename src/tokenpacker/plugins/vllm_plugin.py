"""Registers the model with vLLM, which calls `register` in each of its processes."""

from __future__ import annotations

ARCHITECTURE = "TokenPackerForConditionalGeneration"
TOKENIZER_MODE = "tokenpacker"


def register() -> None:
    """Registers the configuration, the model and its tokenizer with vLLM. A second call changes nothing."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry

    import tokenpacker.hf  # noqa: F401 - the configuration, with transformers
    from tokenpacker.plugins.vllm_tokenizer import TokenizerChoice, register_tokenizer

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "tokenpacker.plugins.vllm_model:TokenPackerForVLLM")
    MODELS_CONFIG_MAP[ARCHITECTURE] = TokenizerChoice
    register_tokenizer()
