"""Floating-point operations for an image and its answer, counted without weights.

`FlopCounterMode` counts the matrix products and convolutions of the modules on the meta device, which has shapes and no
numbers. A multiplication and its addition are two operations.

Shapes: n tokens, L patches, C vision width, M levels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, PreTrainedConfig

from tokenpacker import projectors
from tokenpacker.features import VisionFeatures
from tokenpacker.hf.configuration import TokenPackerConfig
from tokenpacker.hf.versions import CACHE
from tokenpacker.hf.vision_encoder import build_vision_tower, encode_tiles
from tokenpacker.projectors import ProjectorConfig

FORMULA = "2n(2d^2+2d*d_kv+3dm)+4n^2d"  # what a layer of LLaMA's kind comes to; causal attention is counted whole
COUNTED_LENGTH = 64  # tokens; counted at this length and at twice this length


def count(call: Callable[[], Any]) -> int:
    """Counts the operations of the matrix products and convolutions within a call."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@dataclass(frozen=True, kw_only=True)
class LanguageCost:
    """Operations and cache of a language model: `linear * n + quadratic * n^2` operations for n tokens.

    Args:
        head: operations of the head for one position.
        cache: numbers of keys and values per token.
    """

    linear: int
    quadratic: int
    head: int
    cache: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> LanguageCost:
        """Counts a text config's model.

        Raises ValueError where a layer needs numbers or keeps something else than keys and values.
        """
        with torch.device("meta"):
            model = AutoModel.from_config(copy.deepcopy(config)).eval()  # the setters below write to the config
        model.set_attn_implementation("eager")  # plain matrix products, which every version of the counter knows
        model.set_experts_implementation("batched_mm")  # the others look at which expert a token goes to
        try:
            short, cache = _count_prompt(model, COUNTED_LENGTH)
            long, _ = _count_prompt(model, 2 * COUNTED_LENGTH)
        except (AttributeError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"the operations of a {config.model_type} model cannot be counted without weights"
                f" ({' '.join(str(error).split())[:200]}); use a language model whose layers have attention"
            ) from error
        quadratic = (long - 2 * short) // (2 * COUNTED_LENGTH**2)
        return cls(
            linear=short // COUNTED_LENGTH - quadratic * COUNTED_LENGTH,
            quadratic=quadratic,
            head=2 * config.hidden_size * config.vocab_size,
            cache=cache // COUNTED_LENGTH,
        )

    def prefill(self, num_tokens: int) -> int:
        """Operations for a prompt, without the head."""
        return self.linear * num_tokens + self.quadratic * num_tokens**2

    def decode(self, num_prompt: int, num_output: int) -> int:
        """Operations for all output tokens but the first, which comes from the prefill; the head is included."""
        contexts = range(num_prompt + 1, num_prompt + num_output)
        return sum(self.linear + self.quadratic * context + self.head for context in contexts)

    def cache_bytes(self, num_tokens: int, bytes_per_number: float) -> int:
        """Bytes of keys and values."""
        return round(self.cache * num_tokens * bytes_per_number)


class FlopTable:
    """Counts for one model; the language model, the tower and each projector are counted once."""

    def __init__(self, config: TokenPackerConfig):
        self.config = config
        self._projectors: dict[tuple[ProjectorConfig, int | None], int] = {}

    @cached_property
    def language(self) -> LanguageCost:
        """The language model's."""
        return LanguageCost.of(self.config.text_config)

    @cached_property
    def vision(self) -> int:
        """The vision tower's for one tile."""
        return count_vision(self.config)

    def of(
        self,
        projector: ProjectorConfig,
        scale_factor: int | None,
        *,
        num_tiles: int,
        num_prompt: int,
        num_output: int = 1,
        batch_size: int = 1,
    ) -> dict[str, int]:
        """Operations by part, for images of `num_tiles` in prompts of `num_prompt` tokens, image tokens included.

        `prefill` is `language` and `head` together, `first_token` everything up to the first token, and `decode` all
        further tokens.
        """
        key = projector, scale_factor
        if key not in self._projectors:
            self._projectors[key] = count_projector(projector, self.config.patch_grid, scale_factor)
        parts = {
            "vision": num_tiles * self.vision,
            "projector": num_tiles * self._projectors[key],
            "language": self.language.prefill(num_prompt),
            "head": self.language.head,
        }
        prefill = parts["language"] + parts["head"]
        parts |= {"prefill": prefill, "first_token": parts["vision"] + parts["projector"] + prefill}
        parts |= {"decode": self.language.decode(num_prompt, num_output)}
        return {part: batch_size * operations for part, operations in parts.items()}


def count_vision(config: TokenPackerConfig) -> int:
    """Counts the vision tower for one tile, up to the last level that is used."""
    with torch.device("meta"):
        tower = build_vision_tower(copy.deepcopy(config)).eval()  # the setter below writes to the config
        tile = torch.empty(1, 3, *config.tile_size)
    tower.set_attn_implementation("eager")
    levels = (config.vision_levels, config.vision_query_level)
    return count(lambda: encode_tiles(tower, tile, config.patch_grid, *levels))


def count_projector(config: ProjectorConfig, patch_grid: tuple[int, int], scale_factor: int | None) -> int:
    """Counts a projector for one tile, not folded."""
    num_patches = patch_grid[0] * patch_grid[1]
    with torch.device("meta"):
        projector = projectors.build(config).eval()
        query = torch.empty(1, num_patches, config.vision_dim)  # (1, L, C)
        levels = torch.empty(1, num_patches, config.vision_dim * config.num_levels)  # (1, L, M*C)
    features = VisionFeatures(query, levels, patch_grid)
    return count(lambda: projector(features, scale_factor))


def _count_prompt(model: Any, length: int) -> tuple[int, int]:
    """Operations and numbers in the cache for a prompt of random embeddings."""
    with torch.device("meta"):
        embeddings = torch.empty(1, length, model.config.hidden_size)
        mask = torch.zeros(1, 1, length, length)  # ready made: to make one, some versions look at numbers
    outputs: list[Any] = []
    operations = count(lambda: outputs.append(model(inputs_embeds=embeddings, attention_mask=mask, use_cache=True)))
    return operations, sum(layer.keys.numel() + layer.values.numel() for layer in outputs[0][CACHE].layers)
