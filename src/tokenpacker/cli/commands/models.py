"""`tokenpacker models`: the carried models, and the released checkpoints with what was published of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from tokenpacker.cli.commands.count import Geometry
from tokenpacker.cli.loading import read_json
from tokenpacker.cli.options import JsonOption
from tokenpacker.cli.output import print_json
from tokenpacker.hub import carried_model_path, carried_models

if TYPE_CHECKING:
    from rich.table import Table

    from tokenpacker.released import ReleasedModel, Score

UNKNOWN = "-"
LEGEND = (
    "All read CLIP-L/14 at 336 pixels and speak Vicuna-1.5. pixels: largest image, as published. s: one token packs"
    " s x s patches. tokens: per image, ~ the published mean. tiles: most of them, the thumbnail not counted."
)


def models(as_json: JsonOption = False) -> None:
    """List the models that have names: those that travel with the package, and the released checkpoints.

    The released ones with hub id, resolution, tokens, tile limit, published scores and their source.

    Examples:

        tokenpacker models

        tokenpacker models --json | jq -r '.models[] | .hub_id // empty'
    """
    from tokenpacker.released import RELEASED_MODELS

    carried = [_carried(name) for name in carried_models()]
    if as_json:
        print_json({"carried": carried, "models": [_as_json(model) for model in RELEASED_MODELS]})
        return
    from rich.console import Console

    console = Console(highlight=False, emoji=False, markup=False)
    console.print("Carried models: --model takes their names")
    console.print(_carried_table(carried))
    console.print("\nReleased checkpoints: convert one first")
    console.print(_facts(RELEASED_MODELS))
    console.print(LEGEND)
    for title, table in _scores(RELEASED_MODELS):
        console.print(f"\n{title}", soft_wrap=True)
        console.print(table)
    console.print()
    for model in RELEASED_MODELS:
        if model.note:
            console.print(f"{model.name}: {model.note} Trained on {model.training_data}.")
    for source in dict.fromkeys(model.facts_from for model in RELEASED_MODELS):
        console.print(f"Source: {source}", soft_wrap=True)


def _carried(name: str) -> dict[str, Any]:
    """What a carried model is, from its own files."""
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


def _carried_table(carried: list[dict[str, Any]]) -> Table:
    table = _table("name", "projector", "s", "regions", "MB")
    for model in carried:
        scale_factor = UNKNOWN if model["scale_factor"] is None else str(model["scale_factor"])
        regions = "yes" if model["regions"] else "no"
        table.add_row(model["name"], model["projector"], scale_factor, regions, str(model["megabytes"]))
    return table


def _as_json(model: ReleasedModel) -> dict[str, Any]:
    return {**asdict(model), "tokens_per_tile": model.tokens_per_tile, "scores": dict(model.scores)}


def _facts(models: tuple[ReleasedModel, ...]) -> Table:
    """What the models are. Narrow enough for 80 columns, for a hub id that is broken in two cannot be copied."""
    table = _table("hub id", "pixels", "s", "tokens", "tiles")
    for model in models:
        tokens = f"{'~' if model.max_tiles else ''}{model.mean_tokens}" if model.mean_tokens else UNKNOWN
        table.add_row(
            model.hub_id or f"none ({model.name})",
            "x".join(map(str, model.resolution)) if model.resolution else UNKNOWN,
            str(model.scale_factor),
            tokens,
            str(model.max_tiles or 1),
        )
    return table


def _scores(models: tuple[ReleasedModel, ...]) -> Iterator[tuple[str, Table]]:
    """A title and a table for the models that were trained alike and tested on the same benchmarks."""
    with_scores = (model for model in models if model.scores)
    for (data, source), group in groupby(with_scores, key=lambda model: (model.training_data, model.scores_from)):
        rows = list(group)
        table = _table("", *dict(rows[0].scores))
        for model in rows:
            table.add_row(model.name.removeprefix("TokenPacker-"), *(_written(score) for _, score in model.scores))
        yield f"Scores of those trained on {data}. Source: {source}", table


def _written(score: Score) -> str:
    return "/".join(map(str, score)) if isinstance(score, tuple) else str(score)


def _table(first: str, *numbers: str) -> Table:
    """An empty table of a text and of numbers; nothing in it is ever broken."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column(first, no_wrap=True)
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table
