"""`tokenpacker train RECIPE`: the paper's stages and their variants."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

import tokenpacker
from tokenpacker.cli.options import JsonOption
from tokenpacker.cli.output import print_json, print_note
from tokenpacker.known_models import resolve

UNFINISHED = 75  # "try again", as sysexits.h has it: what waits for the model must not start
ENGINES = Path(tokenpacker.__file__).parent / "train" / "accelerate"


def train_recipe(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE", help="Such as align-7b or instruct-13b-hd16-lora, or the file of a whole config."
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="FILE", help="LLaVA JSON or JSONL, COCO captions, Parquet, or tar shards."),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option("--images", metavar="FOLDER", help="Where image paths start.", show_default="the data's folder"),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--start",
            metavar="FOLDER|HUB-ID",
            help="Model to continue from, such as that of stage 1; tiny is the one that the package carries.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FOLDER",
            help="Where all of it goes.",
            show_default="runs/RECIPE, or the run of a config.json",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, such as optimizer.learning_rate=1e-4."),
    ] = None,
    config_file: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="YAML or JSON with settings to change.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show config, parameters, tokens, steps and memory; load no weights.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train by a recipe; call it again after an interruption and it goes on.

    Exit code 0: the model is finished. 75: a signal stopped the run, and the same command goes on. 2: it cannot run.

    Several devices: accelerate launch --config_file FILE -m tokenpacker train RECIPE ...

    Examples:

        tokenpacker train align-7b --data blip_laion_cc_sbu_558k.json --images pretrain

        tokenpacker train instruct-7b --data llava_v1_5_mix665k.json --images data --start runs/align-7b/model

        tokenpacker train instruct-tiny --start tiny --set max_steps=20

        tokenpacker train instruct-7b-hd9-qlora --data mine.json --set data.packed=true --dry-run
    """
    config = _resolved(recipe, data, images, start, settings or [], config_file)
    if dry_run:
        from tokenpacker.train.preview import describe, preview

        shown = preview(config)
        if as_json:
            print_json(shown.to_dict())
        else:
            typer.echo(_as_yaml(config.to_dict()) + describe(shown))
        return
    from transformers.utils.logging import disable_progress_bar

    from tokenpacker.train.run import train

    disable_progress_bar()  # the run has one of its own
    own = Path(recipe).parent if Path(recipe).name == "config.json" else Path("runs") / config.name
    with tells_what_is_kept(output or own):
        folder = train(config, output or own)
    if folder is None:
        raise typer.Exit(UNFINISHED)
    if as_json:
        print_json({"model": str(folder), "recipe": config.name})
    else:
        typer.echo(str(folder))


@contextmanager
def tells_what_is_kept(output: Path) -> Iterator[None]:
    """Ctrl-C outside of the training steps, which end with a checkpoint, ends the command in one line."""
    try:
        yield
    except KeyboardInterrupt:
        print_note(f"stopped; {output} keeps what is done so far, and the same command goes on from there")
        raise typer.Exit(UNFINISHED) from None


def list_recipes(as_json: JsonOption = False) -> None:
    """List the recipes: what learns, at which rate, how many samples a step, what becomes of images.

    Examples:

        tokenpacker train recipes

        tokenpacker train recipes --json | jq 'keys'
    """
    from tokenpacker.carried.recipes import recipes

    configs = {name: make() for name, make in recipes().items()}
    if as_json:
        print_json({name: config.to_dict() for name, config in configs.items()})
        return
    name_width = 2 + max(map(len, configs))
    learns = {name: " + ".join([*config.train, *(["lora"] if config.lora else [])]) for name, config in configs.items()}
    parts_width = 2 + max(map(len, learns.values()))
    typer.echo(f"{'recipe':<{name_width}}{'learns':<{parts_width}}{'rate':<8}step  images")
    for name, config in configs.items():
        tiles = f"{config.model.max_tiles} tiles" if config.model.max_tiles else config.model.image_mode or ""
        rate = f"{config.optimizer.learning_rate:<8g}{config.batch_size:>4}"
        typer.echo(f"{name:<{name_width}}{learns[name]:<{parts_width}}{rate}  {tiles}")


def engines(as_json: JsonOption = False) -> None:
    """List accelerate's config files for several devices that come with the package.

    Examples:

        tokenpacker train engines

        accelerate launch --config_file $(tokenpacker train engines --json | jq -r .fsdp2) -m tokenpacker train align-7b
    """
    files = sorted(ENGINES.glob("*.yaml"))
    if as_json:
        print_json({path.stem: str(path) for path in files})
        return
    for path in files:
        first = path.read_text(encoding="utf-8").splitlines()[0]
        typer.echo(f"{path.stem:<8}{first.lstrip('# ')}\n        {path}")


def _resolved(
    recipe: str, data: str | None, images: str | None, start: str | None, settings: list[str], file: Path | None
) -> Any:
    """The recipe's config with the file's, the options' and the single settings put in, in this order."""
    from tokenpacker.carried.recipes import find_recipe
    from tokenpacker.train.config import changed, from_dict, merged, read_config

    written = Path(recipe).suffix in (".json", ".yaml", ".yml")
    config = from_dict(read_config(Path(recipe))) if written else find_recipe(recipe)
    if file is not None:
        config = merged(config, read_config(file))
    start = start or config.model.start
    options = {"data": {"path": data, "images": images}, "model": {"start": start and resolve(start)}}
    given = {part: {k: v for k, v in values.items() if v is not None} for part, values in options.items()}
    return changed(merged(config, {part: values for part, values in given.items() if values}), settings)


def _as_yaml(content: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(content, sort_keys=False)
