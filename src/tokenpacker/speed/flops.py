"""What a model computes for an image and its answer, in floating-point operations, without running it.

A multiplication and the addition that goes with it count as two operations. The language model's are those of a named
formula; the vision tower's and the projector's are counted from the matrix products and convolutions that their
modules do on the meta device, which has shapes and no numbers, so that any tower and any projector can be counted.

Shapes: n tokens, d language width, d_kv width of all keys, m width of the language model's MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, PreTrainedConfig

from tokenpacker import projectors
from tokenpacker.features import VisionFeatures
from tokenpacker.hf.configuration import TokenPackerConfig
from tokenpacker.hf.vision_encoder import build_vision_tower, encode_tiles
from tokenpacker.speed.model_sizes import Candidate

FORMULA = "2n(2d^2+2d*d_kv+3dm)+4n^2d"  # per layer and sequence; attention is counted without the causal half left out
CHECKED_LENGTH = 64  # tokens at which the formula is compared with the modules' own count


@dataclass(frozen=True, kw_only=True)
class LanguageSizes:
    """What the formula needs to know of a language model.

    Args:
        width: d.
        query_width: of all heads together; the formula's d in most models.
        key_value_width: d_kv.
        mlp_width: m, of a gated MLP's three matrices.
    """

    num_layers: int
    width: int
    query_width: int
    key_value_width: int
    mlp_width: int
    vocabulary: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> LanguageSizes:
        """Read from a text config. Raises ValueError where it has no such sizes."""
        names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
        missing = [name for name in names if not isinstance(getattr(config, name, None), int)]
        if missing:
            raise ValueError(
                f"the {config.model_type} config has no {missing[0]}, which the formula {FORMULA} needs; use a language"
                " model of LLaMA's kind"
            )
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            num_layers=config.num_hidden_layers,
            width=config.hidden_size,
            query_width=heads * head_dim,
            key_value_width=(getattr(config, "num_key_value_heads", None) or heads) * head_dim,
            mlp_width=config.intermediate_size,
            vocabulary=config.vocab_size,
        )

    def prefill(self, num_tokens: int) -> int:
        """Operations for a prompt of n tokens, without the head: the formula times the layers."""
        return self.num_layers * (num_tokens * self._linears + 4 * num_tokens**2 * self.query_width)

    def step(self, context: int) -> int:
        """Operations of all layers for one more token that sees `context` tokens, itself included."""
        return self.num_layers * (self._linears + 4 * context * self.query_width)

    def decode(self, num_prompt: int, num_output: int) -> int:
        """Operations for all but the first of so many output tokens, head included; the first comes of the prefill."""
        return sum(self.step(num_prompt + index) + self.head for index in range(1, num_output))

    @property
    def head(self) -> int:
        """Operations of the head for one position."""
        return 2 * self.width * self.vocabulary

    def cache_bytes(self, num_tokens: int, bytes_per_number: float) -> int:
        """Keys and values of so many tokens."""
        return round(2 * self.num_layers * self.key_value_width * num_tokens * bytes_per_number)

    @property
    def _linears(self) -> int:
        """2(2d^2+2d*d_kv+3dm), with the queries' own width where it is not d."""
        attention = 2 * self.width * self.query_width + 2 * self.width * self.key_value_width
        return 2 * (attention + 3 * self.width * self.mlp_width)


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations for one image and its prompt up to the first token, by part."""

    vision: int
    projector: int
    language: int
    head: int

    @property
    def prefill(self) -> int:
        """Of the language model with its head."""
        return self.language + self.head

    @property
    def first_token(self) -> int:
        """Of everything up to the first token."""
        return self.vision + self.projector + self.prefill


class FlopTable:
    """Counts for one model; towers and projectors are counted once each."""

    def __init__(self, config: TokenPackerConfig):
        self.config = config
        self.language = LanguageSizes.of(config.text_config)
        self._vision: int | None = None
        self._projectors: dict[Candidate, int] = {}

    def of(self, candidate: Candidate, num_tiles: int, num_prompt: int) -> Flops:
        """Operations for an image of so many tiles in a prompt of so many tokens, the image's included."""
        if self._vision is None:
            self._vision = count_vision(self.config)
        if candidate not in self._projectors:
            self._projectors[candidate] = count_projector(self.config, candidate)
        return Flops(
            vision=num_tiles * self._vision,
            projector=num_tiles * self._projectors[candidate],
            language=self.language.prefill(num_prompt),
            head=self.language.head,
        )


def count(call: Callable[[], Any]) -> int:
    """Operations of the matrix products and convolutions within a call."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def count_vision(config: TokenPackerConfig) -> int:
    """Operations of the vision tower for one tile, up to the last level that is used."""
    with torch.device("meta"):
        tower = build_vision_tower(config).eval()
        tile = torch.empty(1, 3, *config.tile_size)
    tower.set_attn_implementation("eager")  # plain matrix products, which every version of the counter knows
    levels = (config.vision_levels, config.vision_query_level)
    return count(lambda: encode_tiles(tower, tile, config.patch_grid, *levels))


def count_projector(config: TokenPackerConfig, candidate: Candidate) -> int:
    """Operations of a projector for one tile, of its plain path: a faster one of equal results may need fewer."""
    rows, cols = config.patch_grid
    projector_config = candidate.config
    with torch.device("meta"):
        projector = projectors.build(projector_config).eval()
        query = torch.empty(1, rows * cols, projector_config.vision_dim)
        levels = torch.empty(1, rows * cols, projector_config.vision_dim * projector_config.num_levels)
    features = VisionFeatures(query, levels, config.patch_grid)
    return count(lambda: projector(features, candidate.scale_factor))


def formula_excess(config: TokenPackerConfig) -> float | None:
    """How much more the formula says than the language model's modules multiply, as a share: 0 where it holds exactly.

    It holds for LLaMA and its kin, and not where layers do something else: experts, or an MLP of two matrices. None
    where that cannot be told without numbers, as with experts.
    """
    with torch.device("meta"):
        model = AutoModel.from_config(config.text_config).eval()
        embeddings = torch.empty(1, CHECKED_LENGTH, config.text_config.hidden_size)
        mask = torch.zeros(1, 1, CHECKED_LENGTH, CHECKED_LENGTH)  # ready made, as making one looks at numbers
    model.set_attn_implementation("eager")
    try:
        counted = count(lambda: model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False))
    except RuntimeError:  # of the meta device, which has no numbers to look at
        return None
    return LanguageSizes.of(config.text_config).prefill(CHECKED_LENGTH) / counted - 1
