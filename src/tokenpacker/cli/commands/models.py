"""`tokenpacker models`: the carried models, and the released checkpoints with what was published of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from tokenpacker.cli import options
from tokenpacker.cli.model_files import Geometry, read_json
from tokenpacker.cli.output import print_json
from tokenpacker.known_models import carried_model_path, carried_models

if TYPE_CHECKING:
    from rich.table import Table

    from tokenpacker.released import ReleasedModel

UNKNOWN = "-"
LEGEND = (
    "All read CLIP-L/14 at 336 pixels and speak Vicuna-1.5. pixels: largest image, as published. s: one token packs"
    " s x s patches. tokens: per image, ~ the published mean. tiles: most of them, the thumbnail not counted."
)


def models(as_json: options.Json = False) -> None:
    """List the carried models and the released checkpoints, with their scores.

    Examples:
        tokenpacker models
        tokenpacker models --json | jq -r '.models[] | .hub_id // empty'
    """
    from tokenpacker.released import RELEASED_MODELS

    carried = [_carried(name) for name in carried_models()]
    if as_json:
        print_json({"carried": carried, "models": [_released(model) for model in RELEASED_MODELS]})
        return
    from rich.console import Console

    console = Console(highlight=False, emoji=False, markup=False)
    console.print("Carried models: --model takes their names")
    console.print(_carried_table(carried))
    console.print("\nReleased checkpoints: convert one first")
    console.print(_released_table(RELEASED_MODELS))
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
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {
        "name": name,
        "projector": projector.name,
        "scale_factor": getattr(projector, "scale_factor", None),
        "regions": read_json(folder / "config.json").get("region_config") is not None,
        "megabytes": round(weights / 1e6, 1),
    }


def _released(model: ReleasedModel) -> dict[str, Any]:
    return {**asdict(model), "tokens_per_tile": model.tokens_per_tile, "scores": dict(model.scores)}


def _carried_table(carried: list[dict[str, Any]]) -> Table:
    table = _table("name", "projector", "s", "regions", "MB")
    for model in carried:
        regions = "yes" if model["regions"] else "no"
        scale_factor = model["scale_factor"] or UNKNOWN
        table.add_row(*map(str, (model["name"], model["projector"], scale_factor, regions, model["megabytes"])))
    return table


def _released_table(models: tuple[ReleasedModel, ...]) -> Table:
    """Facts about the models, within 80 columns: a hub id that is broken in two cannot be copied."""
    table = _table("hub id", "pixels", "s", "tokens", "tiles")
    for model in models:
        tokens = f"{'~' if model.max_tiles else ''}{model.mean_tokens}" if model.mean_tokens else UNKNOWN
        pixels = "x".join(map(str, model.resolution)) if model.resolution else UNKNOWN
        name = model.hub_id or f"none ({model.name})"
        table.add_row(name, pixels, str(model.scale_factor), tokens, str(model.max_tiles or 1))
    return table


def _score_tables(models: tuple[ReleasedModel, ...]) -> Iterator[tuple[str, Table]]:
    """Title and table for the models with the same training data and the same benchmarks."""
    with_scores = (model for model in models if model.scores)
    for (data, source), group in groupby(with_scores, key=lambda model: (model.training_data, model.scores_from)):
        rows = list(group)
        table = _table("", *dict(rows[0].scores))
        for model in rows:
            scores = ["/".join(map(str, score)) if isinstance(score, tuple) else score for _, score in model.scores]
            table.add_row(model.name.removeprefix("TokenPacker-"), *map(str, scores))
        yield f"Scores of those trained on {data}. Source: {source}", table


def _table(first: str, *numbers: str) -> Table:
    """An empty table of a text column and number columns, whose cells are never broken."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column(first, no_wrap=True)
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table
