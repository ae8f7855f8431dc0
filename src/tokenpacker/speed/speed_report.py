"""A speed measurement: its protocol, and its rows as a table and as JSON, with warnings.

A row is JSON-ready. It is one projector at one batch size:

    projector, scale_factor, trained, batch_size
    counted        counts from the tensors, for the whole batch: tiles, tokens_per_tile, image_tokens and prompt_tokens
                   of one prompt, output_tokens of the long answer, cache_bytes after its first token, full_cache_bytes
                   after its last, and peak_bytes from pixels to its end, None where the system does not tell
    milliseconds   median and p95 by part: vision, projector, prefill (the language model up to its first token),
                   first_token (these three in the same round), per_output_token (None for answers of one token), and
                   total (to the end of the long answer)
    folded_projector_milliseconds   the projector after `fold()`; None for one that cannot be folded
    flops          operations by part, see `FlopTable.of`
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tokenpacker.projectors.base import require_positive
from tokenpacker.speed.flops import FORMULA
from tokenpacker.speed.machine import machine_text, versions_text
from tokenpacker.speed.model_sizes import MLP
from tokenpacker.speed.tables import UNKNOWN, markdown, mebi, milliseconds, number, size_text, tera, times

SAME = 0.05  # ratios this near to 1 say nothing, as two runs of the same thing differ by as much
HALF = 0.5  # of the theoretical speed-up; below it there is a warning
Row = dict[str, Any]


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
class SpeedReport:
    """The rows of a measurement and its circumstances.

    Args:
        random_weights: whether the model was made of shapes alone.
        attention: implementation by part, and the kernels that torch chose.
        machine: what `machine.describe_machine` returns.
        peak_kind: which memory `peak_bytes` is.
        needed_bytes: the estimate from before the measurement.
    """

    name: str
    random_weights: bool
    dtype: str
    protocol: Protocol
    image_size: tuple[int, int]
    attention: dict[str, Any]
    machine: dict[str, Any]
    peak_kind: str
    needed_bytes: int
    rows: list[Row]

    @property
    def warnings(self) -> list[str]:
        """Parts whose time does not follow their operations."""
        return [line for row in self.rows for line in disagreements(row, self._full_row(row))]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; times in milliseconds, for a whole batch."""
        return {
            "model": self.name,
            "random_weights": self.random_weights,
            "dtype": self.dtype,
            "attention": self.attention,
            "machine": self.machine,
            "protocol": {**asdict(self.protocol), "image_size": list(self.image_size), "output_lengths": self._lengths},
            "formula": FORMULA,
            "flops_count": "a multiplication and its addition are two",
            "peak_memory_kind": self.peak_kind,
            "needed_bytes_estimate": self.needed_bytes,
            "rows": [
                row | {"speedup_of_first_token": {"theory": round(theory, 4), "clock": round(clock, 4)}}
                for row in self.rows
                for theory, clock in [speedups(row, self._full_row(row), "first_token")]
            ],
            "warnings": self.warnings,
        }

    def to_markdown(self) -> str:
        """The circumstances, a table of medians with their 95th percentiles, and the warnings."""
        weights = "random weights" if self.random_weights else "its own weights"
        kernels = ", ".join(kernel.removeprefix("aten::") for kernel in self.attention["kernels"])
        lines = [
            f"{self.name}, {weights}, {self.dtype}, image {size_text(self.image_size)},"
            f" {self.protocol.text_tokens} text tokens, answers of {' and '.join(map(str, self._lengths))} tokens,"
            f" {self.protocol.rounds} rounds",
            f"{machine_text(self.machine)}; attention {self.attention['language_model']}"
            f" ({kernels or 'plain matrix products'}); {versions_text(self.machine)}",
            "",
            *self._table(),
            "",
            "Times in ms for the batch: median (95th percentile). `folded` is the projector after `fold()`; all other"
            " times are without it. TFLOP and both speed-ups up to the first token; these against mlp.",
            f"Peak: {self.peak_kind}.",
        ]
        return "\n".join([*lines, *(f"\nwarning: {line}" for line in self.warnings)])

    def _table(self) -> list[str]:
        header = ["batch", "projector", "s", "image tokens", "vision", "projector", "folded", "prefill", "first token"]
        header += ["per token", f"{self.protocol.output_tokens} tokens", "KV cache MiB", "peak MiB", "TFLOP"]
        rows = []
        for row in self.rows:
            vision, projector, *others = row["milliseconds"].values()
            spreads = (vision, projector, row["folded_projector_milliseconds"], *others)
            rows.append(
                [
                    number(row["batch_size"]),
                    row["projector"],
                    number(row["scale_factor"]),
                    number(row["counted"]["image_tokens"]),
                    *(f"{milliseconds(of['median'])} ({milliseconds(of['p95'])})" if of else UNKNOWN for of in spreads),
                    mebi(row["counted"]["full_cache_bytes"]),
                    mebi(row["counted"]["peak_bytes"]),
                    tera(row["flops"]["first_token"]),
                    *map(times, speedups(row, self._full_row(row), "first_token")),
                ]
            )
        return markdown([*header, "by theory", "by clock"], rows)

    def _full_row(self, row: Row) -> Row:
        """The row of the MLP that keeps every token, at the same batch size."""
        return next(one for one in self.rows if one["projector"] == MLP and one["batch_size"] == row["batch_size"])

    @property
    def _lengths(self) -> list[int]:
        return sorted({1, self.protocol.output_tokens})


def speedups(row: Row, full: Row, part: str) -> tuple[float, float]:
    """A part's speed-up against the full-token row: by its operations, and by the clock."""
    operations = full["flops"][part] / max(1, row["flops"][part])
    return operations, full["milliseconds"][part]["median"] / row["milliseconds"][part]["median"]


def disagreements(row: Row, full: Row) -> Iterator[str]:
    """Lines on the parts whose speed-up against the full-token row is not the one that theory promises."""
    for part in ("projector", "prefill", "first_token"):
        theory, clock = speedups(row, full, part)
        if theory > 1 + SAME and clock < 1 - SAME:
            problem = "fewer operations but slower"
        elif theory < 1 - SAME and clock > 1 + SAME:
            problem = "more operations but faster"
        elif theory > 1 + SAME and clock < HALF * theory:
            problem = "less than half of the speed-up that theory promises"
        else:
            continue
        yield (
            f"{row['projector']} at batch {row['batch_size']}, {part.replace('_', ' ')}: {problem}"
            f" (against {MLP} {theory:.2f} x by theory, {clock:.2f} x by the clock)"
        )
