"""Next tokens of a batch whose rows each have their own temperature, share of probability and random numbers.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from tokenpacker.serve.questions import Sampling

COLDEST = 1e-5  # a draw at less is the most likely token, and float32 cannot divide by much less; vLLM has it, too
SEEDS = 2**63  # more than torch's generators take on every device


class RowSampler:
    """Draws the tokens of one answer. They do not depend on the answers beside it.

    Args:
        index: number of the answer. Answers to one question differ.
    """

    def __init__(self, sampling: Sampling, index: int):
        self.greedy = sampling.temperature < COLDEST
        self._warpers = LogitsProcessorList()
        if self.greedy:
            return
        if sampling.temperature != 1:
            self._warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed((sampling.seed + index) % SEEDS)

    def draw(self, logits: Tensor) -> int:
        """A token for logits (V,) in float32 on the CPU."""
        scores = self._warpers(None, logits[None])
        return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=self._generator))


def choose_tokens(logits: Tensor, samplers: Sequence[RowSampler]) -> list[int | None]:
    """A token for each row of logits (B, V); None for a row that has a NaN or an infinite maximum."""
    best, likely = logits.max(dim=-1)  # NaN is the maximum of a row that has one
    tokens = [token if good else None for token, good in zip(likely.tolist(), best.isfinite().tolist(), strict=True)]
    drawn = [row for row, sampler in enumerate(samplers) if not sampler.greedy and tokens[row] is not None]
    for row, scores in zip(drawn, logits[drawn].float().cpu(), strict=True):
        tokens[row] = samplers[row].draw(scores)
    return tokens
