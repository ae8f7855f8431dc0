"""`tokenpacker models`: the carried models, and the released checkpoints with what was published of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from tokenpacker.cli import options
from tokenpacker.cli.model_files import Geometry, read_json
from tokenpacker.cli.output import print_json
from tokenpacker.hub import carried_model_path, carried_models

if TYPE_CHECKING:
    from rich.table import Table

    from tokenpacker.released import ReleasedModel

UNKNOWN = "-"
LEGEND = (
    "All read CLIP-L/14 at 336 pixels and speak Vicuna-1.5. pixels: largest image, as published. s: one token packs"
    " s x s patches. tokens: per image, ~ the published mean. tiles: most of them, the thumbnail not counted."
)


def models(as_json: options.Json = False) -> None:
    """List the carried models and the released checkpoints.

    Examples:
        tokenpacker models
        tokenpacker models --json | jq -r '.models[] | .hub_id // empty'
    """
    from tokenpacker.released import RELEASED_MODELS

    carried = [_carried(name) for name in carried_models()]
    if as_json:
        added = [{"tokens_per_tile": model.tokens_per_tile, "scores": dict(model.scores)} for model in RELEASED_MODELS]
        released = [asdict(model) | more for model, more in zip(RELEASED_MODELS, added, strict=True)]
        print_json({"carried": carried, "models": released})
        return
    from rich.console import Console

    console = Console(highlight=False, emoji=False, markup=False)
    console.print("Carried models: --model takes their names")
    rows = [(*list(one.values())[:3], "yes" if one["regions"] else "no", one["megabytes"]) for one in carried]
    console.print(_table(("name", "projector", "s", "regions", "MB"), rows))
    console.print("\nReleased checkpoints: convert one first")
    console.print(_table(("hub id", "pixels", "s", "tokens", "tiles"), map(_facts, RELEASED_MODELS)))
    console.print(LEGEND)
    for title, table in _score_tables(RELEASED_MODELS):
        console.print(f"\n{title}", soft_wrap=True)
        console.print(table)
    console.print()
    for model in RELEASED_MODELS:
        if model.note:
            console.print(f"{model.name}: {model.note} Trained on {model.training_data}.")
    for source in dict.fromkeys(model.facts_from for model in RELEASED_MODELS):
        console.print(f"Source: {source}", soft_wrap=True)


def _carried(name: str) -> dict[str, Any]:
    """Facts about a carried model, from its own files."""
    folder = carried_model_path(name)
    projector = Geometry.of_model(folder).projector
    return {
        "name": name,
        "projector": projector.name,
        "scale_factor": getattr(projector, "scale_factor", None),
        "regions": read_json(folder / "config.json").get("region_config") is not None,
        "megabytes": round(sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6, 1),
    }


def _facts(model: ReleasedModel) -> tuple[object, ...]:
    """Facts about a released model. They fit 80 columns: a hub id that is broken in two cannot be copied."""
    pixels = "x".join(map(str, model.resolution)) if model.resolution else None
    tokens = f"{'~' if model.max_tiles else ''}{model.mean_tokens}" if model.mean_tokens else None
    return model.hub_id or f"none ({model.name})", pixels, model.scale_factor, tokens, model.max_tiles or 1


def _score_tables(models: Sequence[ReleasedModel]) -> Iterator[tuple[str, Table]]:
    """Title and table for the models with the same training data and the same benchmarks."""
    with_scores = (model for model in models if model.scores)
    for (data, source), group in groupby(with_scores, key=lambda model: (model.training_data, model.scores_from)):
        same = list(group)
        rows = []
        for model in same:
            scores = ["/".join(map(str, score)) if isinstance(score, tuple) else score for _, score in model.scores]
            rows.append((model.name.removeprefix("TokenPacker-"), *scores))
        yield f"Scores of those trained on {data}. Source: {source}", _table(("", *dict(same[0].scores)), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A column of texts and columns of numbers, whose cells are never broken."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for number, column in enumerate(head):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(UNKNOWN if cell is None else str(cell) for cell in row))
    return table
