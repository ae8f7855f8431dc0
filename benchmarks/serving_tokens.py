"""The part about tokens: what an image costs a server at 36, 64, 144 and 576 tokens."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig

from benchmarks.serving_clients import Outcome, Request, body_of, send_all, serving
from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor, carried_model_path
from tokenpacker.scenes import FinePrint
from tokenpacker.speed.model_sizes import SMALL_TEXT, named_shapes

TOKEN_COUNTS = {4: 36, 3: 64, 2: 144, 1: 576}  # scale factor -> packed tokens of 24 x 24 patches
TOGETHER = 16  # clients at once; the engine's batch has as many rows
ANSWER = 64  # tokens of each answer of the random model


def save_random_model(folder: Path) -> None:
    """A model of random weights with CLIP-L/336's patch grid, one tile an image, that never ends an answer itself."""
    tokenizer = AutoTokenizer.from_pretrained(carried_model_path())
    config = named_shapes("small").config
    config.text_config = LlamaConfig(
        **SMALL_TEXT,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    model = TokenPackerForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.all_special_ids] = 0  # never the largest of all logits
    model.save_pretrained(folder)
    TokenPackerProcessor.from_config(config, tokenizer, image_mode="pad").save_pretrained(folder)


def measure_tokens(program: Sequence[str], engine: str, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Times of one client, and the throughput of one and of many, at each number of tokens an image."""
    numbers = iter(range(10**6))

    def requests(scale_factor: int, count: int) -> list[Request]:
        made = []
        for _ in range(count):
            picture = FinePrint("train")[next(numbers)].image.resize((336, 336))
            options = {"scale_factor": scale_factor, "max_tokens": ANSWER, "stream": True}
            options["stream_options"] = {"include_usage": True}
            made.append(Request("good", body_of(picture, "what is it?", **options)))
        return made

    alone: dict[int, list[Outcome]] = {factor: [] for factor in TOKEN_COUNTS}
    rates: dict[int, list[tuple[float, float]]] = {factor: [] for factor in TOKEN_COUNTS}
    with serving(program, folder, engine) as server:
        for number in range(rounds + 1):  # the first warms up
            for factor in TOKEN_COUNTS:
                single, seconds_alone, _ = asyncio.run(send_all(server, requests(factor, 2), 1))
                many, seconds, _ = asyncio.run(send_all(server, requests(factor, TOGETHER), TOGETHER))
                if number:
                    alone[factor] += single
                    rates[factor].append((_tokens(single) / seconds_alone, _tokens(many) / seconds))
    rows = []
    for factor, tokens in TOKEN_COUNTS.items():
        first = [outcome.first_token_s for outcome in alone[factor] if outcome.first_token_s]
        rest = [
            (one.seconds - one.first_token_s) / (one.usage["completion_tokens"] - 1)
            for one in alone[factor]
            if one.first_token_s
        ]
        rows.append(
            {
                "engine": engine,
                "scale_factor": factor,
                "packed_tokens": tokens,
                "prompt_tokens": alone[factor][0].usage["prompt_tokens"],
                "first_token_ms": 1000 * statistics.median(first),
                "per_token_ms": 1000 * statistics.median(rest),
                "tokens_per_second_1_client": statistics.median(one for one, _ in rates[factor]),
                f"tokens_per_second_{TOGETHER}_clients": statistics.median(many for _, many in rates[factor]),
                "throughput_ratio": statistics.median(many / one for one, many in rates[factor]),
            }
        )
    return rows


def _tokens(outcomes: Sequence[Outcome]) -> int:
    return sum(outcome.usage["completion_tokens"] for outcome in outcomes)
