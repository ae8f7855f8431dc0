"""A speed measurement's protocol, and its rows: one per projector and batch size.

Shapes: N tiles of all images in a batch, S tokens of a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenpacker.projectors.base import require_positive
from tokenpacker.speed.flops import Flops
from tokenpacker.speed.model_sizes import Candidate
from tokenpacker.speed.stopwatch import Spread


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a measurement is done.

    Args:
        image_size: (height, width); None is one tile.
        text_tokens: text in each prompt, besides the image.
        output_tokens: length of the long answer; the short one has a single token. Both lengths are forced.
        rounds: how often everything is timed.
        warm_up: untimed rounds before; the memory is measured in the first of them.
    """

    image_size: tuple[int, int] | None = None
    batch_sizes: tuple[int, ...] = (1, 8)
    text_tokens: int = 64
    output_tokens: int = 128
    rounds: int = 10
    warm_up: int = 2

    def __post_init__(self) -> None:
        if not self.batch_sizes:
            raise ValueError("batch_sizes is empty; name at least one, for example 1 and 8")
        require_positive("the smallest of batch_sizes", min(self.batch_sizes))
        for name in ("text_tokens", "output_tokens", "rounds", "warm_up"):
            require_positive(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Counts from the tensors of a call.

    Args:
        tiles: N, of the whole batch.
        image_tokens: of one prompt, separators included.
        prompt_tokens: S.
        output_tokens: of the long answer.
        cache_bytes: keys and values of the whole batch after the first token.
        full_cache_bytes: the same after the long answer.
        peak_bytes: peak memory from pixels to the end of the long answer; None where the system does not tell.
    """

    tiles: int
    tokens_per_tile: int
    image_tokens: int
    prompt_tokens: int
    output_tokens: int
    cache_bytes: int
    full_cache_bytes: int
    peak_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class SpeedRow:
    """One projector at one batch size.

    Args:
        times: by part, for the whole batch. `prefill` is the language model up to its first token, `first_token` is
            vision, projector and prefill of the same round, `per_output_token` is None for answers of one token, and
            `total` ends with the long answer.
        folded: the projector's time after `fold()`; None for a projector that has no such form.
        flops: of the whole batch.
    """

    candidate: Candidate
    batch_size: int
    counted: Counted
    times: dict[str, Spread | None]
    folded: Spread | None = None
    flops: Flops

    def median(self, part: str) -> float:
        """Milliseconds of a part that has a time."""
        spread = self.times[part]
        assert spread is not None, f"{part} has no time"
        return spread.median

    def milliseconds(self) -> dict[str, Any]:
        """All times, JSON-ready."""
        return {part: spread and spread.to_dict() for part, spread in self.times.items()}
