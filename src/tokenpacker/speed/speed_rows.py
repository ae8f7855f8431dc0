"""What is measured of speed, and what is found: settings, and a row for each projector at each batch size.

Shapes: N tiles of all images in a batch, S tokens of a prompt.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenpacker.projectors.base import require_positive
from tokenpacker.speed.flops import Flops
from tokenpacker.speed.model_sizes import Candidate

PERCENTILE = 0.95


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is measured.

    Args:
        image_size: (height, width); None is one tile.
        text_tokens: of each prompt, beside its image's.
        output_tokens: of the long answer; the short one has a single token. Both are forced, whatever the model says.
        rounds: how often everything is timed.
        warm_up: how often everything runs before, the first run being the one whose memory is measured.
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


@dataclass(frozen=True)
class Spread:
    """Median and 95th percentile of several times, in milliseconds."""

    median: float
    p95: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Of times in seconds; percentiles between two times are interpolated."""
        ordered = sorted(1000 * value for value in seconds)
        place = PERCENTILE * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return cls(statistics.median(ordered), ordered[low] + (place - low) * (ordered[high] - ordered[low]))


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What the tensors of a call held, counted in them.

    Args:
        tiles: N, of the whole batch.
        image_tokens: of one prompt, separators included.
        prompt_tokens: S.
        output_tokens: of the long answer.
        cache_bytes: keys and values of the whole batch after the first token.
        full_cache_bytes: those after the long answer.
        peak_bytes: the most memory in use during the long answer, from pixels on; None where nothing tells.
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
        prefill: the language model up to its first token.
        first_token: vision, projector and prefill together, of the same round.
        per_token: of each further token, for the whole batch; None for answers of one token.
        total: pixels to the end of the long answer.
        flops: of the whole batch, up to the first token.
        decode_flops: of the whole batch, after the first token.
    """

    candidate: Candidate
    batch_size: int
    counted: Counted
    vision: Spread
    projector: Spread
    prefill: Spread
    first_token: Spread
    per_token: Spread | None
    total: Spread
    flops: Flops
    decode_flops: int


@dataclass
class Times:
    """Seconds of each part, one of each in a round.

    Args:
        prefill: the answer of one token.
        answer: the long answer.
        decode: what the long answer took after its first token.
    """

    vision: list[float] = field(default_factory=list)
    projector: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    answer: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    def spreads(self, output_tokens: int) -> dict[str, Spread | None]:
        """The times that a `SpeedRow` has."""
        first = [sum(parts) for parts in zip(self.vision, self.projector, self.prefill, strict=True)]
        total = [sum(parts) for parts in zip(self.vision, self.projector, self.answer, strict=True)]
        steps = [seconds / (output_tokens - 1) for seconds in self.decode] if output_tokens > 1 else None
        return {
            "vision": Spread.of(self.vision),
            "projector": Spread.of(self.projector),
            "prefill": Spread.of(self.prefill),
            "first_token": Spread.of(first),
            "per_token": None if steps is None else Spread.of(steps),
            "total": Spread.of(total),
        }
