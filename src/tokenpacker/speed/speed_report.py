"""A speed measurement as a table and as JSON, with warnings where time does not follow the operations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tokenpacker.speed.flops import FORMULA
from tokenpacker.speed.machine import machine_text, versions_text
from tokenpacker.speed.model_sizes import MLP
from tokenpacker.speed.speed_rows import Protocol, SpeedRow
from tokenpacker.speed.tables import UNKNOWN, markdown, mebi, number, size_text, tera, times

SAME = 0.05  # ratios this near to 1 say nothing, as two runs of the same thing differ by as much
HALF = 0.5  # of the theoretical speed-up; below it there is a warning
PARTS = ("projector", "prefill", "first_token")


@dataclass(frozen=True, kw_only=True)
class SpeedReport:
    """The result of a measurement and its circumstances.

    Args:
        random_weights: whether the model was made of shapes alone.
        attention: implementation by part, and the kernels that torch chose.
        machine: as `machine.describe_machine`.
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
    rows: tuple[SpeedRow, ...]

    @property
    def warnings(self) -> list[str]:
        """Parts whose time does not follow their operations."""
        return [line for row in self.rows for line in disagreements(row, self.full_row(row))]

    def full_row(self, row: SpeedRow) -> SpeedRow:
        """The row of the MLP that keeps every token, at the same batch size."""
        return next(one for one in self.rows if one.candidate.name == MLP and one.batch_size == row.batch_size)

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
            "rows": [self._row(row) for row in self.rows],
            "warnings": self.warnings,
        }

    def _row(self, row: SpeedRow) -> dict[str, Any]:
        theory, clock = speedups(row, self.full_row(row), "first_token")
        return {
            "projector": row.candidate.name,
            "scale_factor": row.candidate.packs,
            "trained": row.candidate.trained,
            "batch_size": row.batch_size,
            "counted": asdict(row.counted),
            "milliseconds": row.milliseconds(),
            "folded_projector_milliseconds": row.folded and row.folded.to_dict(),
            "flops": row.flops.to_dict(),
            "speedup_of_first_token": {"theory": round(theory, 4), "clock": round(clock, 4)},
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
            vision, projector, *others = row.times.values()
            shown = (vision, projector, row.folded, *others)
            rows.append(
                [
                    number(row.batch_size),
                    row.candidate.name,
                    number(row.candidate.packs),
                    number(row.counted.image_tokens),
                    *(UNKNOWN if spread is None else str(spread) for spread in shown),
                    mebi(row.counted.full_cache_bytes),
                    mebi(row.counted.peak_bytes),
                    tera(row.flops.first_token),
                    *map(times, speedups(row, self.full_row(row), "first_token")),
                ]
            )
        return markdown([*header, "by theory", "by clock"], rows)

    @property
    def _lengths(self) -> list[int]:
        return sorted({1, self.protocol.output_tokens})


def speedups(row: SpeedRow, full: SpeedRow, part: str) -> tuple[float, float]:
    """A part's speed-up against the full-token row: by its operations, and by the clock."""
    operations = getattr(full.flops, part) / max(1, getattr(row.flops, part))
    return operations, full.median(part) / row.median(part)


def disagreements(row: SpeedRow, full: SpeedRow) -> Iterator[str]:
    """Lines on the parts whose speed-up against the full-token row is not the one that theory promises."""
    for part in PARTS:
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
            f"{row.candidate.name} at batch {row.batch_size}, {part.replace('_', ' ')}: {problem}"
            f" (against {MLP} {theory:.2f} x by theory, {clock:.2f} x by the clock)"
        )
