"""What an image will cost, answered from sizes alone: tokens, operations by part, key/value cache. Nothing runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenpacker.evaluate.tables import markdown, mebi, number, size_text, tera
from tokenpacker.speed.flops import FORMULA, Flops, FlopTable, formula_excess
from tokenpacker.speed.model_sizes import MLP, Candidate, Mode, Shapes, candidates

SCALE_FACTORS = (2, 3, 4)
MODES: tuple[Mode, ...] = ("one-tile", "slice")
FORMULA_TOLERANCE = 0.01
BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}
PLANNED_DTYPE = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One projector at one scale factor on one image.

    Args:
        image_tokens: with separators.
        prompt_tokens: image and text.
        flops: up to the first token, of one image and prompt.
        decode_flops: of all further output tokens.
        cache_bytes: keys and values of the prompt.
        full_cache_bytes: those of the prompt and all output tokens that go back into the model: all but the last.
        fits_context: whether prompt and answer are within the language model's context.
    """

    candidate: Candidate
    mode: Mode
    grid: tuple[int, int]
    tiles: int
    tokens_per_tile: int
    image_tokens: int
    prompt_tokens: int
    flops: Flops
    decode_flops: int
    cache_bytes: int
    full_cache_bytes: int
    fits_context: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All rows for one image; the last of each mode keeps every token."""

    shapes: Shapes
    image_size: tuple[int, int]
    text_tokens: int
    output_tokens: int
    dtype: str
    rows: tuple[PlanRow, ...]
    notes: tuple[str, ...]

    def saved(self, row: PlanRow) -> float:
        """How many times as many operations the MLP that keeps every token needs up to the first token."""
        full = next(one for one in self.rows if one.candidate.name == MLP and one.mode == row.mode)
        return full.flops.first_token / row.flops.first_token

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, for one image and its prompt."""
        text = self.shapes.config.text_config
        return {
            "model": self.shapes.name,
            "image": list(self.image_size),
            "own_mode": self.shapes.own_mode,
            "text_tokens": self.text_tokens,
            "output_tokens": self.output_tokens,
            "cache_dtype": self.dtype,
            "context": getattr(text, "max_position_embeddings", None),
            "formula": FORMULA,
            "flops_count": "a multiplication and its addition are two",
            "rows": [self._row(row) for row in self.rows],
            "notes": list(self.notes),
        }

    def _row(self, row: PlanRow) -> dict[str, Any]:
        flops = row.flops
        return {
            "mode": row.mode,
            "projector": row.candidate.name,
            "scale_factor": row.candidate.packs,
            "grid": list(row.grid),
            "tiles": row.tiles,
            "tokens_per_tile": row.tokens_per_tile,
            "image_tokens": row.image_tokens,
            "prompt_tokens": row.prompt_tokens,
            "fits_context": row.fits_context,
            "flops": {
                "vision": flops.vision,
                "projector": flops.projector,
                "language": flops.language,
                "head": flops.head,
                "first_token": flops.first_token,
                "decode": row.decode_flops,
            },
            "saved_by_theory": round(self.saved(row), 3),
            "cache_bytes": row.cache_bytes,
            "full_cache_bytes": row.full_cache_bytes,
        }

    def to_markdown(self) -> str:
        """A table with a line of what it stands for above it."""
        header = ["image", "projector", "s", "tiles", "image tokens", "vision", "projector", "prefill", "first token"]
        header += ["mlp needs", f"{self.output_tokens} tokens", "KV cache MiB"]
        rows = [
            [
                row.mode if row.mode == "one-tile" else f"{row.grid[0]} x {row.grid[1]}",
                row.candidate.name,
                number(row.candidate.packs),
                number(row.tiles),
                f"{row.image_tokens:,}{'' if row.fits_context else ' !'}",
                tera(row.flops.vision),
                tera(row.flops.projector),
                tera(row.flops.prefill),
                tera(row.flops.first_token),
                f"{self.saved(row):.2f} x",
                tera(row.decode_flops),
                mebi(row.cache_bytes),
            ]
            for row in self.rows
        ]
        title = (
            f"{self.shapes.name}, an image of {size_text(self.image_size)}, {self.text_tokens} text tokens;"
            f" TFLOP by `{FORMULA}` a layer; cache of the prompt in {self.dtype}"
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
        projectors: names to plan beside `average-pool` and `mlp`; empty takes the model's own.
        scale_factor: None plans 2, 3 and 4, and says where a projector cannot honour one.
        dtype: of keys and values; None takes 16 bits.

    Raises:
        ValueError: for names, scale factors and types that cannot be, and language models without the formula's sizes.
    """
    dtype = dtype or PLANNED_DTYPE
    if dtype not in BYTES:
        raise ValueError(f"dtype={dtype!r} is no type of keys and values; use one of {', '.join(BYTES)}")
    size = shapes.config.tile_size if image_size is None else image_size
    asked, notes = _candidates(shapes, projectors, scale_factor)
    table = FlopTable(shapes.config)
    lengths = (text_tokens, output_tokens)
    rows = [_row(shapes, table, one, mode, size, lengths, BYTES[dtype]) for mode in MODES for one in asked]
    if not all(row.fits_context for row in rows):
        context = shapes.config.text_config.max_position_embeddings
        notes.append(f"! with text and answer this exceeds the language model's context of {context:,} tokens")
    excess = formula_excess(shapes.config)
    if excess is None:
        notes.append(f"whether {FORMULA} holds for this language model could not be checked")
    elif abs(excess) > FORMULA_TOLERANCE:
        notes.append(f"{FORMULA} says {excess:+.1%} beside what this language model's modules multiply")
    return Plan(
        shapes=shapes,
        image_size=size,
        text_tokens=text_tokens,
        output_tokens=output_tokens,
        dtype=dtype,
        rows=tuple(rows),
        notes=tuple(notes),
    )


def _candidates(shapes: Shapes, names: Sequence[str], scale_factor: int | None) -> tuple[list[Candidate], list[str]]:
    """Every projector at every scale factor, the MLP once and last; and what cannot be."""
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
    table: FlopTable,
    candidate: Candidate,
    mode: Mode,
    image_size: tuple[int, int],
    lengths: tuple[int, int],
    bytes_per_number: float,
) -> PlanRow:
    text_tokens, output_tokens = lengths
    layout = shapes.layout(candidate, image_size, mode)
    prompt = layout.num_tokens + text_tokens
    grid = layout.tile_grid
    kept = prompt + output_tokens - 1  # the last token is said and never read
    context = getattr(shapes.config.text_config, "max_position_embeddings", None)
    return PlanRow(
        candidate=candidate,
        mode=mode,
        grid=(grid.rows, grid.cols),
        tiles=grid.num_tiles,
        tokens_per_tile=layout.tokens_per_tile,
        image_tokens=layout.num_tokens,
        prompt_tokens=prompt,
        flops=table.of(candidate, grid.num_tiles, prompt),
        decode_flops=table.language.decode(prompt, output_tokens),
        cache_bytes=table.language.cache_bytes(prompt, bytes_per_number),
        full_cache_bytes=table.language.cache_bytes(kept, bytes_per_number),
        fits_context=context is None or prompt + output_tokens <= context,
    )
