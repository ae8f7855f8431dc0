"""Questions to vLLM on the CPU, and what transformers answers to them. `make test-vllm` runs the tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Case:
    """A question: a prompt with its images, and options of the processor."""

    prompt: str
    images: list[Any] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    def for_vllm(self) -> dict[str, Any]:
        images = {"multi_modal_data": {"image": self.images}, "mm_processor_kwargs": self.options}
        return {"prompt": self.prompt} | (images if self.images else {})


class Transformers:
    """The same model in transformers, in float32."""

    def __init__(self, folder: Path):
        from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor

        self.processor = TokenPackerProcessor.from_pretrained(folder)
        self.model = TokenPackerForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    def answer(self, case: Case, max_tokens: int = 12, model: Any = None) -> tuple[list[int], list[int]]:
        """The ids of the prompt, and those of the greedy answer."""
        inputs = self.processor(images=case.images or None, text=case.prompt, return_tensors="pt", **case.options)
        out = (model or self.model).generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        length = inputs["input_ids"].shape[1]
        return inputs["input_ids"][0].tolist(), out[0, length:].tolist()


def start(folder: Path, **options: Any) -> Any:
    """An engine, in this process unless it needs several."""
    from vllm import LLM

    settings = {"dtype": "float32", "max_model_len": 2048, "max_num_seqs": 16, "enforce_eager": True}
    return LLM(str(folder), **settings | options)


def answers(engine: Any, cases: list[Case], max_tokens: int = 12, **options: Any) -> list[tuple[list[int], list[int]]]:
    """As `Transformers.answer`, for all cases in one batch."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=max_tokens)
    outputs = engine.generate([case.for_vllm() for case in cases], greedy, use_tqdm=False, **options)
    return [(list(output.prompt_token_ids), list(output.outputs[0].token_ids)) for output in outputs]
