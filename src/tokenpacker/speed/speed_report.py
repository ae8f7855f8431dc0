"""A speed measurement as people and programs read it: a table, JSON, and where theory and clock disagree."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tokenpacker.evaluate.tables import markdown, mebi, milliseconds, number, tera
from tokenpacker.speed.flops import FORMULA
from tokenpacker.speed.model_sizes import MLP
from tokenpacker.speed.speed_rows import Protocol, SpeedRow, Spread

SAME = 0.05  # ratios nearer to 1 than this say nothing: so far do two runs of one thing differ
HALF = 0.5  # of what theory promises, below which it is said
PARTS = ("projector", "prefill", "first_token")


@dataclass(frozen=True, kw_only=True)
class SpeedReport:
    """What was measured, on what, and how.

    Args:
        random_weights: whether the model was made of shapes alone.
        attention: implementation by part, and the kernels that torch took.
        machine: as `machine.describe_machine`.
        peak_kind: what peak memory is here.
        needed_bytes: the memory that was estimated beforehand.
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
        """Where fewer operations did not take as much less time as they should, or more took less."""
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

    def to_markdown(self) -> str:
        """What ran on what, a table of medians with their 95th percentiles, and the warnings."""
        machine = self.machine
        versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
        weights = "random weights" if self.random_weights else "its own weights"
        lines = [
            f"{self.name}, {weights}, {self.dtype}, image {self.image_size[0]} x {self.image_size[1]},"
            f" {self.protocol.text_tokens} text tokens, answers of {' and '.join(map(str, self._lengths))} tokens,"
            f" {self.protocol.rounds} rounds",
            f"{machine.get('gpu') or machine['processor']}, {machine['cores']} cores, {machine['threads']} threads;"
            f" attention {self._attention_text()}; {versions}",
            "",
            *markdown(self._header(), [self._cells(row) for row in self.rows]),
            "",
            "Times in ms for the batch: median (95th percentile). TFLOP and both speed-ups up to the first token; these"
            " against mlp.",
            f"Peak: {self.peak_kind}.",
        ]
        return "\n".join([*lines, *(f"\nwarning: {line}" for line in self.warnings)])

    @property
    def _lengths(self) -> list[int]:
        return sorted({1, self.protocol.output_tokens})

    def _attention_text(self) -> str:
        kernels = ", ".join(kernel.removeprefix("aten::") for kernel in self.attention["kernels"])
        return f"{self.attention['language_model']} ({kernels or 'plain matrix products'})"

    def _header(self) -> list[str]:
        header = ["batch", "projector", "s", "image tokens", "vision", "projector", "prefill", "first token"]
        header += ["per token", f"{self.protocol.output_tokens} tokens", "KV cache MiB", "peak MiB", "TFLOP"]
        return [*header, "by theory", "by clock"]

    def _cells(self, row: SpeedRow) -> list[str]:
        full = self.full_row(row)
        times = (row.vision, row.projector, row.prefill, row.first_token, row.per_token, row.total)
        return [
            number(row.batch_size),
            row.candidate.name,
            number(row.candidate.packs),
            number(row.counted.image_tokens),
            *map(_written, times),
            mebi(row.counted.full_cache_bytes),
            mebi(row.counted.peak_bytes),
            tera(row.flops.first_token),
            f"{full.flops.first_token / row.flops.first_token:.2f} x",
            f"{full.first_token.median / row.first_token.median:.2f} x",
        ]

    def _row(self, row: SpeedRow) -> dict[str, Any]:
        full = self.full_row(row)
        return {
            "projector": row.candidate.name,
            "scale_factor": row.candidate.packs,
            "trained": row.candidate.trained,
            "batch_size": row.batch_size,
            "counted": asdict(row.counted),
            "milliseconds": {
                name: spread and {"median": round(spread.median, 4), "p95": round(spread.p95, 4)}
                for name, spread in _named_times(row).items()
            },
            "flops": {**asdict(row.flops), "first_token": row.flops.first_token, "decode": row.decode_flops},
            "speedup_of_first_token": {
                "theory": round(full.flops.first_token / row.flops.first_token, 4),
                "clock": round(full.first_token.median / row.first_token.median, 4),
            },
        }


def disagreements(row: SpeedRow, full: SpeedRow) -> Iterator[str]:
    """Lines that say where the row's times against the full-token row's are not what its operations promise."""
    for part in PARTS:
        theory = getattr(full.flops, part) / max(1, getattr(row.flops, part))
        clock = _named_times(full)[part].median / _named_times(row)[part].median
        problem = _problem(theory, clock)
        if problem is not None:
            yield (
                f"{row.candidate.name} at batch {row.batch_size}, {part.replace('_', ' ')}: {problem}"
                f" (against {MLP} {theory:.2f} x by theory, {clock:.2f} x by the clock)"
            )


def _problem(theory: float, clock: float) -> str | None:
    """What is odd about a speed-up by theory and by the clock; None where they agree."""
    if theory > 1 + SAME and clock < 1 - SAME:
        return "fewer operations but slower"
    if theory < 1 - SAME and clock > 1 + SAME:
        return "more operations but faster"
    if theory > 1 + SAME and clock < HALF * theory:
        return "less than half of the speed-up that theory promises"
    return None


def _named_times(row: SpeedRow) -> dict[str, Any]:
    return {
        "vision": row.vision,
        "projector": row.projector,
        "prefill": row.prefill,
        "first_token": row.first_token,
        "per_output_token": row.per_token,
        "total": row.total,
    }


def _written(spread: Spread | None) -> str:
    return milliseconds(None) if spread is None else f"{milliseconds(spread.median)} ({milliseconds(spread.p95)})"
