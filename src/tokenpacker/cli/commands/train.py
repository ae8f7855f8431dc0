"""`tokenpacker train`: recipes that make a model from nothing."""

import contextlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tokenpacker.cli.commands.train_recipes import UNFINISHED, engines, list_recipes, tells_what_is_kept, train_recipe
from tokenpacker.cli.errors import reports_mistakes
from tokenpacker.cli.options import JsonOption
from tokenpacker.cli.output import print_json
from tokenpacker.hub import resolve

OutputOption = Annotated[
    Path, typer.Option("--output", metavar="FOLDER", help="Where the model and its resumable state are written.")
]
SeedOption = Annotated[int, typer.Option("--seed", help="Decides initial weights and the order of all data.")]


class _Recipes(TyperGroup):
    """Names that are no command are recipes: there are too many for a command each."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command of its own, or the one for recipes."""
        known = args[0] in self.commands or args[0].startswith("-")
        return super().resolve_command(ctx, args if known else ["recipe", *args])


train_app = typer.Typer(
    help="Train a model: by a recipe such as align-7b (`recipes` lists the names, `recipe --help` the options).",
    no_args_is_help=True,
    cls=_Recipes,
)
train_app.command("recipe")(reports_mistakes(train_recipe))
train_app.command("recipes")(reports_mistakes(list_recipes))
train_app.command("engines")(reports_mistakes(engines))


@train_app.command()
@reports_mistakes
def tiny(
    output: OutputOption = Path("tiny"),
    projector: Annotated[
        str, typer.Option("--projector", metavar="NAME", help="token-packer, or mlp for the full-token comparison.")
    ] = "token-packer",
    seed: SeedOption = 0,
    foundation: Annotated[
        Path | None,
        typer.Option(
            "--foundation",
            metavar="FOLDER",
            help="Where encoder and language model are made, or lie finished from another run.",
            show_default="below the output",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train the model that the package carries: encoder, language model, then the two stages of the paper.

    Then all test questions are asked, and the model card gets curves, times and accuracies. Within an hour on two
    cores. Run it again after an interruption and it goes on where it stopped.

    Examples:

        tokenpacker train tiny --output runs/tiny

        tokenpacker train tiny --output runs/tiny-mlp --projector mlp --foundation runs/tiny/state
    """
    from tokenpacker.carried.tiny import train_tiny

    make = partial(train_tiny, output, projector=projector, seed=seed, foundation_dir=foundation)
    _make_and_measure(make, output, {"projector": projector, "seed": seed}, as_json)


@train_app.command("tiny-regions")
@reports_mistakes
def tiny_regions(
    output: OutputOption = Path("tiny-regions"),
    start: Annotated[
        Path | None,
        typer.Option(
            "--start", metavar="FOLDER", help="A model that `train tiny` made.", show_default="the carried one"
        ),
    ] = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Teach the carried model about regions: the original's two region stages, on generated pictures with masks.

    Then all test questions are asked, those about masks too. Run it again after an interruption and it goes on where it
    stopped.

    Examples:

        tokenpacker train tiny-regions --output runs/tiny-regions
    """
    from tokenpacker.carried.tiny import train_tiny_regions

    start = None if start is None else Path(resolve(str(start)))
    make = partial(train_tiny_regions, output, start=start, seed=seed)
    _make_and_measure(make, output, {"seed": seed}, as_json)


def _make_and_measure(make: Callable[[], Path | None], output: Path, told: dict[str, Any], as_json: bool) -> None:
    """Trains a tiny model, asks it all test questions, and puts the accuracies into its card."""
    from tokenpacker.carried.card import add_accuracies
    from tokenpacker.evaluate import measure_model

    with tells_what_is_kept(output), contextlib.redirect_stdout(sys.stderr):  # the Trainer prints its logs
        folder = make()
        if folder is None:
            raise typer.Exit(UNFINISHED)
        accuracies = measure_model(folder)
    add_accuracies(folder, accuracies)
    if as_json:
        print_json({"model": str(folder), **told, "accuracies": accuracies})
    else:
        typer.echo(str(folder))
