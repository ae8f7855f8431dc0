"""`tokenpacker train`: recipes of the paper by their names, and the models that the package carries."""

import contextlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument

import tokenpacker
from tokenpacker.cli import options
from tokenpacker.cli.command_group import CommandGroup
from tokenpacker.cli.errors import UNFINISHED, keeping
from tokenpacker.cli.known_names import recipe_name
from tokenpacker.cli.options import flag, value
from tokenpacker.cli.output import print_result
from tokenpacker.hub import resolve

ENGINES = Path(tokenpacker.__file__).parent / "train" / "accelerate"
KEPT = "{} keeps what is done so far, and the same command goes on from there"
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


@train_app.command("recipe")
def train_recipe(
    recipe: Annotated[
        str, Argument(metavar="RECIPE", callback=recipe_name, help="A name of `train recipes`, or a config's file.")
    ],
    data: Annotated[str | None, value("FILE", "LLaVA JSON or JSONL, COCO captions, Parquet, tar shards.")] = None,
    images: Annotated[str | None, value("FOLDER", "Start of image paths.", "the data's")] = None,
    start: Annotated[str | None, value("MODEL", "Folder, hub id or name of the model to start from.")] = None,
    output: Annotated[
        Path | None, value("FOLDER", "Where everything goes.", "runs/RECIPE, or the config's run")
    ] = None,
    settings: Annotated[
        list[str] | None, value("KEY=VALUE", "A setting: optimizer.learning_rate=1e-4.", name="--set")
    ] = None,
    config_file: Annotated[Path | None, value("FILE", "YAML or JSON with settings to change.", name="--config")] = None,
    dry_run: Annotated[bool, flag("--dry-run", "Show config, parameters, steps and memory only.")] = False,
    as_json: options.Json = False,
) -> None:
    """Train by a recipe. The same command goes on after an interruption.

    Exit code 0: the model is finished. 75: a signal stopped the run. 2: it cannot run.
    Several devices: accelerate launch --config_file FILE -m tokenpacker train RECIPE ...

    Examples:
        tokenpacker train align-7b --data blip_laion_cc_sbu_558k.json --images pretrain
        tokenpacker train instruct-7b --data llava_v1_5_mix665k.json --images data --start runs/align-7b/model
        tokenpacker train instruct-tiny --start tiny --set max_steps=20
        tokenpacker train instruct-7b-hd9-qlora --data mine.json --set data.packed=true --dry-run
        tokenpacker train align-7b --data mine.json --set eval_every=100 --set evaluation.held_out_share=0.01
    """
    config = _resolved(recipe, data, images, start, settings or [], config_file)
    if dry_run:
        import yaml

        from tokenpacker.train.preview import describe, preview

        shown = preview(config)
        text = yaml.safe_dump(config.to_dict(), sort_keys=False) + describe(shown)
        print_result(as_json, shown.to_dict(), text)
        return
    from transformers.utils.logging import disable_progress_bar

    from tokenpacker.train.run import train

    disable_progress_bar()  # the run has one of its own
    own = Path(recipe).parent if Path(recipe).name == "config.json" else Path("runs") / config.name
    with keeping(KEPT.format(output or own), UNFINISHED):
        folder = train(config, output or own)
    if folder is None:
        raise typer.Exit(UNFINISHED)
    print_result(as_json, {"model": str(folder), "recipe": config.name}, str(folder))


def _resolved(
    recipe: str, data: str | None, images: str | None, start: str | None, settings: list[str], file: Path | None
) -> Any:
    """The recipe's config; the file's settings, the options and the single settings replace its own, in this order."""
    from tokenpacker.carried.recipes import find_recipe
    from tokenpacker.train.config import changed, from_dict, merged, read_config

    written = Path(recipe).suffix in (".json", ".yaml", ".yml")
    config = from_dict(read_config(Path(recipe))) if written else find_recipe(recipe)
    if file is not None:
        config = merged(config, read_config(file))
    start = start or config.model.start
    asked = {"data": {"path": data, "images": images}, "model": {"start": start and resolve(start)}}
    given = {part: {k: v for k, v in values.items() if v is not None} for part, values in asked.items()}
    return changed(merged(config, {part: values for part, values in given.items() if values}), settings)


@train_app.command("recipes")
def list_recipes(as_json: options.Json = False) -> None:
    """List the recipes: trained parts, learning rate, samples a step, and tiles.

    Examples:
        tokenpacker train recipes
        tokenpacker train recipes --json | jq 'keys'
    """
    from tokenpacker.carried.recipes import recipes

    configs = {name: make() for name, make in recipes().items()}
    rows = [("recipe", "learns", "rate", "step", "images")]
    for name, config in configs.items():
        parts = " + ".join([*config.train, *(["lora"] if config.lora else [])])
        tiles = f"{config.model.max_tiles} tiles" if config.model.max_tiles else config.model.image_mode or ""
        rows.append((name, parts, f"{config.optimizer.learning_rate:g}", str(config.batch_size), tiles))
    name_width, parts_width = (2 + max(len(row[column]) for row in rows) for column in (0, 1))
    lines = [f"{a:<{name_width}}{b:<{parts_width}}{rate:<8}{step:>4}  {tiles}" for a, b, rate, step, tiles in rows]
    print_result(as_json, {name: config.to_dict() for name, config in configs.items()}, "\n".join(lines))


@train_app.command()
def engines(as_json: options.Json = False) -> None:
    """List accelerate's config files for several devices that come with the package.

    Examples:
        tokenpacker train engines
        accelerate launch --config_file $(tokenpacker train engines --json | jq -r .fsdp2) -m tokenpacker train align-7b
    """
    files = sorted(ENGINES.glob("*.yaml"))
    lines = []
    for path in files:
        first = path.read_text(encoding="utf-8").splitlines()[0]
        lines += [f"{path.stem:<8}{first.lstrip('# ')}", f"        {path}"]
    print_result(as_json, {path.stem: str(path) for path in files}, "\n".join(lines))


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
