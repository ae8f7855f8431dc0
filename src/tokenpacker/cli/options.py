"""How options are declared, and the options that several commands share: `model: options.Model = None`.

Help and default should fit one line of `--help` at 100 columns. Panels hold the options that few people need.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tokenpacker.cli.arguments import device_name, in_range, picture_file, scale_factor

LOADING, MORE = "Device and loading", "More"  # panels


def value(
    metavar: str, help: str, default: str | None = None, panel: str | None = None, name: str = "", **more: Any
) -> Any:
    """An option with a value.

    Args:
        name: such as `--set`; "" takes the parameter's.
        default: shown for a default that the command works out itself.
        panel: title of the group in `--help`.
        more: arguments of `typer.Option`.
    """
    shown: Any = True if default is None else default
    return typer.Option(*name.split(), metavar=metavar, help=help, show_default=shown, rich_help_panel=panel, **more)


def number(
    help: str, default: str | None = None, panel: str | None = None, *, metavar: str = "N", least: int = 1
) -> Any:
    """An option with a whole number of at least `least`."""
    return value(metavar, help, default, panel, callback=in_range(least))


def flag(name: str, help: str, panel: str | None = None) -> Any:
    """An option without a value."""
    return typer.Option(*name.split(), help=help, rich_help_panel=panel)


Model = Annotated[str | None, value("MODEL", "Folder, hub id or name in `models`.", "carried")]
ScaleFactor = Annotated[int | None, number("Pack S x S patches into a token.", "model's", metavar="S")]
AutoScaleFactor = Annotated[  # a number where it is one: the callback changes the text
    str | None, value("S|auto", "Pack S x S patches; auto: by detail.", "model's", callback=scale_factor)
]
MaxImageTokens = Annotated[int | None, number("Most tokens of an image.", "no limit")]
AllowHost = Annotated[list[str] | None, value("NAME", "Answer to this name, too; repeatable.", "localhost")]
MaxTiles = Annotated[int | None, number("Most tiles, without thumbnail.", "model's")]
MaxNewTokens = Annotated[int, number("Longest answer in tokens.")]
Limit = Annotated[int | None, number("Random questions of each task.", "all")]
Seed = Annotated[int, value("N", "Seed of all random choices.")]
Images = Annotated[Path | None, value("FOLDER", "Start of image paths.", "the data's")]
MaxRejects = Annotated[
    float, value("SHARE", "Tolerated share of rejected samples.", name="--max-rejects", callback=in_range(0, 1))
]
Page = Annotated[Path, typer.Option("--out", metavar="PAGE.png", callback=picture_file, help="Where the page goes.")]
Json = Annotated[bool, flag("--json", "Print one JSON object on standard output.")]
Device = Annotated[
    str | None,
    value("DEVICE", "cpu, cuda, cuda:1, or auto for all GPUs.", "cuda if there", LOADING, callback=device_name),
]
Dtype = Annotated[
    Literal["float32", "float16", "bfloat16", "4bit"] | None,
    value("TYPE", "float32, float16, bfloat16 or 4bit.", "as stored", LOADING),
]
Verbose = Annotated[bool, flag("--verbose -v", "Show what the libraries say while loading.", LOADING)]
Regions = Annotated[
    list[str] | None,
    typer.Option(
        "--mask",
        "--box",
        "--polygon",
        metavar="[N:]REGION",
        help="The next <mask> in the question, in image N or the last: a mask's file, x0,y0,x1,y1 or x,y,x,y,x,y,...",
        rich_help_panel="Regions",
    ),
]
