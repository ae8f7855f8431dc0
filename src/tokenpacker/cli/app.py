"""The commands, put together."""

from typing import Annotated

import typer

from tokenpacker import __version__
from tokenpacker.cli.command_group import CommandGroup
from tokenpacker.cli.commands.ask import ask
from tokenpacker.cli.commands.chat import chat
from tokenpacker.cli.commands.comparing.compare import compare
from tokenpacker.cli.commands.comparing.probe import probe
from tokenpacker.cli.commands.comparing.speed import speed
from tokenpacker.cli.commands.convert import convert
from tokenpacker.cli.commands.count import count
from tokenpacker.cli.commands.data import data_app
from tokenpacker.cli.commands.evaluate import evaluate
from tokenpacker.cli.commands.models import models
from tokenpacker.cli.commands.serving.batch import batch
from tokenpacker.cli.commands.serving.export import export
from tokenpacker.cli.commands.serving.serve import serve
from tokenpacker.cli.commands.serving.ui import ui
from tokenpacker.cli.commands.show import show
from tokenpacker.cli.commands.train import train_app
from tokenpacker.cli.output import survive_any_encoding

app = typer.Typer(
    name="tokenpacker",
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a bug's plain traceback is what a report needs
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tokenpacker {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Ask images with a quarter of the visual tokens: tokenpacker ask photo.jpg "what color is the box?\""""


PANELS = {
    "Use a model": (ask, chat, count, show, models, convert, export, serve, batch, ui),
    "Train and measure": (evaluate, speed, compare, probe),
}
for _panel, _commands in PANELS.items():
    for _command in _commands:
        app.command(rich_help_panel=_panel)(_command)
app.add_typer(data_app, name="data", rich_help_panel="Train and measure")
app.add_typer(train_app, name="train", rich_help_panel="Train and measure")


def main() -> None:
    """Entry point of the command `tokenpacker`."""
    survive_any_encoding()
    app()
