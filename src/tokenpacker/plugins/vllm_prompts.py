"""Prompts to token ids under vLLM, exactly as `TokenPackerProcessor` makes them.

vLLM tokenizes a prompt before it reads the images. A bare tokenizer would add a second start token to the one that a
chat template writes, and cannot give the ids that released weights were trained with; see `encode_as_trained`.
"""

from __future__ import annotations

from typing import Any

from vllm.inputs import TextPrompt, TokensPrompt
from vllm.renderers.hf import HfRenderer
from vllm.renderers.params import TokenizeParams

from tokenpacker.hf.processing.prompts import ImageTokens, encode_prompts


class PromptRenderer(HfRenderer):
    """vLLM's renderer of chats and prompts with the processor's token ids."""

    def _tokenize_prompt(self, prompt: TextPrompt, params: TokenizeParams) -> TokensPrompt:
        tokenizer, mark_id = self.get_tokenizer(), self.model_config.hf_config.image_token_id
        mark, text = tokenizer.convert_ids_to_tokens(mark_id), prompt["prompt"]
        offsets = self._wants_offsets(prompt, params)
        options = {"padding": False, "return_offsets_mapping": offsets, **params.get_encode_kwargs()}
        marks = [ImageTokens([mark_id], [mark])] * text.count(mark)  # each stays, for `ImageProcessor` to replace
        row = {name: rows[0] for name, rows in encode_prompts(tokenizer, [text], [marks], mark_id, options).items()}
        return self._build_tokens_prompt(row["input_ids"], prompt, offset_mapping=row.get("offset_mapping"))

    def _process_tokens(self, prompt: TokensPrompt, **kwargs: Any) -> Any:
        self._check(prompt)
        return super()._process_tokens(prompt, **kwargs)

    async def _process_tokens_async(self, prompt: TokensPrompt, **kwargs: Any) -> Any:
        self._check(prompt)
        return await super()._process_tokens_async(prompt, **kwargs)

    def _check(self, prompt: TokensPrompt) -> None:
        """Checks a prompt without images, which vLLM passes to the model as it is. Raises ValueError."""
        if self.mm_processor is not None and not prompt.get("multi_modal_data"):
            self.mm_processor.info.check_prompt(prompt["prompt_token_ids"], 0)
            self.mm_processor.info.image_options(prompt.get("mm_processor_kwargs") or {})
