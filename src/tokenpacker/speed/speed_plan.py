"""The cost of an image from sizes alone: tokens, operations by part, key/value cache. Nothing runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenpacker.speed.flops import FORMULA
from tokenpacker.speed.model_sizes import MLP, Candidate, Mode, Shapes, candidates
from tokenpacker.speed.tables import markdown, mebi, number, size_text, tera, times

SCALE_FACTORS = (2, 3, 4)
MODES: tuple[Mode, ...] = ("one-tile", "slice")
BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}
PLANNED_DTYPE = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan for one image and its prompt.

    Args:
        rows: JSON-ready, one per mode, projector and scale factor; the last of each mode is the MLP that keeps every
            token. `cache_bytes` are keys and values of the prompt; `full_cache_bytes` are also those of all output
            tokens but the last, which the model does not read. `saved_by_theory` is how many times as many operations
            the MLP needs up to the first token.
    """

    shapes: Shapes
    image_size: tuple[int, int]
    text_tokens: int
    output_tokens: int
    dtype: str
    rows: list[dict[str, Any]]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "model": self.shapes.name,
            "image": list(self.image_size),
            "own_mode": self.shapes.own_mode,
            "text_tokens": self.text_tokens,
            "output_tokens": self.output_tokens,
            "cache_dtype": self.dtype,
            "context": self.shapes.context,
            "formula": FORMULA,
            "flops_count": "a multiplication and its addition are two",
            "rows": self.rows,
            "notes": self.notes,
        }

    def to_markdown(self) -> str:
        """A table below a line with its assumptions."""
        header = ["image", "projector", "s", "tiles", "image tokens", "vision", "projector", "prefill", "first token"]
        header += ["mlp needs", f"{self.output_tokens} tokens", "KV cache MiB"]
        rows = [
            [
                row["mode"] if row["mode"] == "one-tile" else size_text(row["grid"]),
                row["projector"],
                number(row["scale_factor"]),
                number(row["tiles"]),
                f"{row['image_tokens']:,}{'' if row['fits_context'] else ' !'}",
                *(tera(row["flops"][part]) for part in ("vision", "projector", "prefill", "first_token")),
                times(row["saved_by_theory"]),
                tera(row["flops"]["decode"]),
                mebi(row["cache_bytes"]),
            ]
            for row in self.rows
        ]
        title = (
            f"{self.shapes.name}, an image of {size_text(self.image_size)}, {self.text_tokens} text tokens; TFLOP"
            f" counted from the modules, `{FORMULA}` for a layer of LLaMA's kind; cache of the prompt in {self.dtype}"
        )
        return "\n".join([title, "", *markdown(header, rows), *(f"\nnote: {note}" for note in self.notes)])


def make_plan(
    shapes: Shapes,
    image_size: tuple[int, int] | None = None,
    *,
    projectors: Sequence[str] = (),
    scale_factor: int | None = None,
    text_tokens: int = 64,
    output_tokens: int = 128,
    dtype: str | None = None,
) -> Plan:
    """The plan for an image of (height, width), whole and cut into tiles; None takes one as large as a tile.

    Args:
        projectors: names to plan besides `average-pool` and `mlp`; empty takes the model's own.
        scale_factor: None plans 2, 3 and 4, with a note for each that a projector cannot honour.
        dtype: of keys and values; None takes 16 bits.

    Raises:
        ValueError: for unknown names and types, scale factors that do not fit, and language models whose operations
            cannot be counted without weights.
    """
    dtype = dtype or PLANNED_DTYPE
    if dtype not in BYTES:
        raise ValueError(f"dtype={dtype!r} is no type of keys and values; use one of {', '.join(BYTES)}")
    size = shapes.config.tile_size if image_size is None else image_size
    asked, notes = _candidates(shapes, projectors, scale_factor)
    rows = []
    for mode in MODES:
        of_mode = [_row(shapes, one, mode, size, text_tokens, output_tokens, BYTES[dtype]) for one in asked]
        full = next(row for row in of_mode if row["projector"] == MLP)["flops"]["first_token"]
        rows += [row | {"saved_by_theory": round(full / row["flops"]["first_token"], 3)} for row in of_mode]
    if not all(row["fits_context"] for row in rows):
        notes.append(f"! with text and answer this exceeds the language model's context of {shapes.context:,} tokens")
    return Plan(
        shapes=shapes,
        image_size=size,
        text_tokens=text_tokens,
        output_tokens=output_tokens,
        dtype=dtype,
        rows=rows,
        notes=notes,
    )


def _candidates(shapes: Shapes, names: Sequence[str], scale_factor: int | None) -> tuple[list[Candidate], list[str]]:
    """Every projector at every scale factor, the MLP once and last; and notes on what does not fit."""
    if scale_factor is not None:
        return candidates(shapes, names, scale_factor), []
    found: dict[Candidate, None] = {}
    notes = []
    for name in dict.fromkeys(one.name for one in candidates(shapes, names)):
        for scale in SCALE_FACTORS if name != MLP else (None,):
            try:
                one = next(one for one in candidates(shapes, [name], scale) if one.name == name)
            except ValueError as error:
                notes.append(f"{name}: {error}")
                continue
            found[one] = None
    return sorted(found, key=lambda one: one.name == MLP), notes


def _row(
    shapes: Shapes,
    candidate: Candidate,
    mode: Mode,
    image_size: tuple[int, int],
    text_tokens: int,
    output_tokens: int,
    bytes_per_number: float,
) -> dict[str, Any]:
    layout, language = shapes.layout(candidate, image_size, mode), shapes.table.language
    grid, prompt = layout.tile_grid, layout.num_tokens + text_tokens
    return {
        "mode": mode,
        "projector": candidate.name,
        "scale_factor": candidate.packs,
        "grid": [grid.rows, grid.cols],
        "tiles": grid.num_tiles,
        "tokens_per_tile": layout.tokens_per_tile,
        "image_tokens": layout.num_tokens,
        "prompt_tokens": prompt,
        "fits_context": shapes.context is None or prompt + output_tokens <= shapes.context,
        "flops": shapes.table.of(
            candidate.config,
            candidate.scale_factor,
            num_tiles=grid.num_tiles,
            num_prompt=prompt,
            num_output=output_tokens,
        ),
        "cache_bytes": language.cache_bytes(prompt, bytes_per_number),
        "full_cache_bytes": language.cache_bytes(prompt + output_tokens - 1, bytes_per_number),
    }
