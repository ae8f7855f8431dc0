"""Which failures are the user's mistakes, and how they are told: one line on standard error, exit code 2.

A mistake is an `OSError` (files, network, a full disk), or a `ValueError` or `ImportError` that this package raised on
purpose. Anything else is a bug, of ours or of a library, and keeps its traceback.

Ctrl-C ends a command with one line, too, and exit code 130: what is kept, and how to go on.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

from tokenpacker.cli.arguments import check_arguments
from tokenpacker.cli.output import print_error, print_json, print_note

EXIT_CODE, INTERRUPTED = 2, 130


def reports_mistakes(command: Callable[..., None]) -> Callable[..., None]:
    """The command, telling the user's mistakes in one line; `--json` adds `{"error": ...}` on standard output.

    What can be checked of the options by themselves is checked before the command runs, and imports what it needs.
    """

    @functools.wraps(command)
    def run(**options: Any) -> None:
        try:
            check_arguments(options)
            command(**options)
        except KeyboardInterrupt as stop:
            print_note(str(stop) or "stopped; nothing is kept: call it again to start anew")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            line = mistake(error)
            if line is None:
                raise
            print_error(line)
            if options.get("as_json"):
                print_json({"error": line})
            raise typer.Exit(EXIT_CODE) from None

    return run


@contextmanager
def keeping(kept: str) -> Iterator[None]:
    """Within the context, Ctrl-C ends the command with a line that says what is kept and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; {kept}") from None


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
