"""`tokenpacker train`: recipes of the paper by their names, and the models that the package carries."""

import contextlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from tokenpacker.cli import options
from tokenpacker.cli.command_group import CommandGroup
from tokenpacker.cli.commands.train_recipes import KEPT, engines, list_recipes, train_recipe
from tokenpacker.cli.errors import UNFINISHED, keeping
from tokenpacker.cli.options import value
from tokenpacker.cli.output import print_result
from tokenpacker.known_models import resolve

Output = Annotated[Path, value("FOLDER", "Where the model and its state go.")]


class Recipes(CommandGroup):
    """A word that is no command is a recipe: there are too many for a command each."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command of its own, or the one for recipes."""
        known = args[0] in self.commands or args[0].startswith("-") or self.other_name(args[0])
        return super().resolve_command(ctx, args if known else ["recipe", *args])


train_app = typer.Typer(
    help="Train a model by a recipe: tokenpacker train align-7b --data FILE --images FOLDER",
    no_args_is_help=True,
    cls=Recipes,
)
train_app.command("recipe")(train_recipe)
train_app.command("recipes")(list_recipes)
train_app.command("engines")(engines)


@train_app.command()
def tiny(
    output: Output = Path("tiny"),
    projector: Annotated[str, value("NAME", "token-packer, or mlp to compare with.")] = "token-packer",
    seed: options.Seed = 0,
    foundation: Annotated[Path | None, value("FOLDER", "Finished encoder and language model.", "made")] = None,
    as_json: options.Json = False,
) -> None:
    """Train the model that the package carries, and ask it all test questions.

    An hour on two cores: encoder, language model, the two stages of the paper. The same command goes on after Ctrl-C.

    Examples:
        tokenpacker train tiny --output runs/tiny
        tokenpacker train tiny --output runs/tiny-mlp --projector mlp --foundation runs/tiny/state
    """
    from tokenpacker.carried.tiny import train_tiny

    make = partial(train_tiny, output, projector=projector, seed=seed, foundation_dir=foundation)
    _make_and_measure(make, output, {"projector": projector, "seed": seed}, as_json)


@train_app.command("tiny-regions")
def tiny_regions(
    output: Output = Path("tiny-regions"),
    start: Annotated[str | None, value("FOLDER", "Model of `train tiny`.", "carried")] = None,
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Teach the carried model about regions, and ask it all test questions.

    The original's two region stages, on generated pictures with masks. The same command goes on after Ctrl-C.

    Examples:
        tokenpacker train tiny-regions --output runs/tiny-regions
    """
    folder = None if start is None else Path(resolve(start))
    from tokenpacker.carried.tiny import train_tiny_regions

    make = partial(train_tiny_regions, output, start=folder, seed=seed)
    _make_and_measure(make, output, {"seed": seed}, as_json)


def _make_and_measure(make: Callable[[], Path | None], output: Path, told: dict[str, Any], as_json: bool) -> None:
    """Trains a tiny model, asks it all test questions, and puts the accuracies into its card."""
    from tokenpacker.carried.card import add_accuracies
    from tokenpacker.evaluate import measure_model

    with keeping(KEPT.format(output), UNFINISHED), contextlib.redirect_stdout(sys.stderr):
        folder = make()  # the Trainer prints its logs
        if folder is None:
            raise typer.Exit(UNFINISHED)
        accuracies = measure_model(folder)
    add_accuracies(folder, accuracies)
    print_result(as_json, {"model": str(folder), **told, "accuracies": accuracies}, str(folder))
