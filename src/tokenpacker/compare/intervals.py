"""A mean over seeds with its confidence interval, by Student's t distribution as seeds are few."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Mean:
    """A mean and half its 95 % interval; None for a single value, which has no interval."""

    mean: float
    half: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """The mean of independent, roughly normal values, such as accuracies of one model with several seeds."""
        if len(values) < 2:
            return cls(values[0], None)
        error = statistics.stdev(values) / math.sqrt(len(values))
        return cls(statistics.mean(values), t_quantile(len(values) - 1) * error)

    def text(self, digits: int = 1, sign: str = "-") -> str:
        """The interval as text for a table: `98.2 ± 0.4`; with `sign="+"`, `+1.3 ± 0.4`."""
        return f"{self.mean:{sign}.{digits}f}" + ("" if self.half is None else f" ± {self.half:.{digits}f}")


def t_quantile(degrees: int, coverage: float = 0.95) -> float:
    """The number of standard errors to both sides that holds this share of Student's t distribution, to nine digits.

    `scipy.stats.t.ppf` has it; scipy is not installed for this one number, and `statistics` has no t distribution.
    """
    low, high = 0.0, 1.0
    while _share_within(high, degrees) < coverage:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _share_within(middle, degrees) < coverage else (low, middle)
    return high


def _share_within(t: float, degrees: int) -> float:
    """P(-t < T < t) for whole degrees of freedom: the finite sums 26.7.3 and 26.7.4 of Abramowitz and Stegun."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine, odd = math.cos(angle), degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for index in range(2 + odd, degrees, 2):
        term *= cosine**2 * (index - 1) / index
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
