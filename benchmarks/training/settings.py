"""What the training benchmark runs: the model's shape, the data's size, and the variant at hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

Variant = Literal["packed", "grouped", "plain"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
TILE_SIZE, PATCH_SIZE, SCALE_FACTOR = 168, 14, 2  # 12 x 12 patches, 36 packed tokens
MAX_TILES = 9  # and a thumbnail


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run of one variant.

    Args:
        variant: `packed` and `grouped` (padded, samples of one kind and similar length together) are this package,
            `plain` is the loop in plain.py.
        num_samples: that every variant learns from, each once.
        samples_per_step: that a padded batch holds; a packed one holds as many on average.
        row_length: tokens of a packed row, and of the longest sample allowed. A quarter of the paper's 2,048, as the
            tokens of a tile are.
        seed: of the order of the samples; the samples and the weights stay the same.
        small: a model that runs in seconds, to try the command.
    """

    variant: Variant = "packed"
    num_samples: int = 64
    samples_per_step: int = 16
    row_length: int = 512
    seed: int = 0
    small: bool = False

    @property
    def vision_config(self) -> dict[str, Any]:
        """A tower of the shape of ViT-Ti: the language model is the larger part, as it is in the paper."""
        width, layers = (64, 8) if self.small else (192, 12)
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 64,
            "image_size": TILE_SIZE,
            "patch_size": PATCH_SIZE,
        }

    @property
    def text_config(self) -> dict[str, Any]:
        """A LLaMA of width 512 and 8 layers, with LLaMA's own vocabulary and ratio of widths."""
        width, layers, vocabulary = (64, 2, 2048) if self.small else (512, 8, 32000)
        return {
            "hidden_size": width,
            "intermediate_size": 1376 * width // 512,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 64,
            "vocab_size": vocabulary,
            "max_position_embeddings": self.row_length,
        }
