"""Which failures are the user's mistakes, and how they are told: one line on standard error, exit code 2.

A mistake is an `OSError` (files, network, a full disk), or a `ValueError` or `ImportError` that this package raised on
purpose. Anything else is a bug, of ours or of a library, and keeps its traceback.
"""

import functools
from collections.abc import Callable
from typing import Any

import typer

from tokenpacker.cli.output import print_error, print_json

EXIT_CODE = 2


def reports_mistakes(command: Callable[..., None]) -> Callable[..., None]:
    """The command, telling the user's mistakes in one line; `--json` adds `{"error": ...}` on standard output."""

    @functools.wraps(command)
    def run(**options: Any) -> None:
        try:
            command(**options)
        except Exception as error:
            line = mistake(error)
            if line is None:
                raise
            print_error(line)
            if options.get("as_json"):
                print_json({"error": line})
            raise typer.Exit(EXIT_CODE) from None

    return run


def mistake(error: Exception) -> str | None:
    """The line to tell the user, or None where the failure is a bug."""
    if isinstance(error, BrokenPipeError):  # the reader left, as `head` does: not worth a word
        return None
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return place + _one_line(error.strerror or str(error) or type(error).__name__)
    if isinstance(error, (ValueError, ImportError)) and _raised_by_this_package(error):
        return _one_line(str(error))
    return None


def _raised_by_this_package(error: Exception) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").split(".")[0] == "tokenpacker"


def _one_line(text: str) -> str:
    return " ".join(text.split())
