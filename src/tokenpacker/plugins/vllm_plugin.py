"""The entry point `vllm.general_plugins`: makes `vllm serve DIR` and `LLM(DIR)` know the model."""

from __future__ import annotations

from typing import Any

ARCHITECTURE = "TokenPackerForConditionalGeneration"
MODE = "tokenpacker"  # of tokenizers and renderers, vLLM's choice of how prompts become ids


def register() -> None:
    """Registers the model with transformers and vLLM, in each of vLLM's processes. A second call changes nothing."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers import TokenizerRegistry

    import tokenpacker.hf  # noqa: F401 - registers with transformers

    class ChooseMode(VerifyAndUpdateConfig):
        """Sets the mode where the user has set none, as vLLM does for models of its own."""

        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            if model_config.tokenizer_mode == "auto":
                model_config.tokenizer_mode = MODE

    if ARCHITECTURE in MODELS_CONFIG_MAP:
        return
    ModelRegistry.register_model(ARCHITECTURE, "tokenpacker.plugins.vllm_model:TokenPackerForVLLM")
    TokenizerRegistry.register(MODE, "vllm.tokenizers.hf", "CachedHfTokenizer")
    RENDERER_REGISTRY.register(MODE, "tokenpacker.plugins.vllm_prompts", "PromptRenderer")
    MODELS_CONFIG_MAP[ARCHITECTURE] = ChooseMode
