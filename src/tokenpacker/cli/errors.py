"""How a user's mistake is reported: one line on standard error, exit code 2, and `{"error": ...}` with `--json`.

A mistake is a wrong command line, an `OSError` (files, network, a full disk), or a `ValueError` or `ImportError` that
this package raised on purpose. Anything else is a bug, of ours or of a library, and keeps its traceback.

Ctrl-C ends a command with exit code 130 and one line that says what is kept and how to go on.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from tokenpacker.cli.output import print_error, print_json, print_note

EXIT_CODE, UNFINISHED, INTERRUPTED = 2, 75, 130  # 75 is "try again" in sysexits.h: the same command goes on
UsageError = typer.BadParameter.__mro__[1]  # click's, or that of typer's own copy of click; typer does not export it


@contextmanager
def mistakes_in_one_line(as_json: bool = False) -> Iterator[None]:
    """Within the context, a mistake ends the program with one line.

    Args:
        as_json: also print the mistake as a JSON object on standard output.
    """
    try:
        yield
    except Exception as error:
        line = mistake(error)
        if line is None:
            raise
        if line:  # without arguments typer prints the help, and raises an error without words
            print_error(line)
            if as_json:
                print_json({"error": line})
        sys.exit(EXIT_CODE)


@contextmanager
def keeping(kept: str, code: int = INTERRUPTED) -> Iterator[None]:
    """Within the context, Ctrl-C ends the command with a line that says what is kept and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        print_note(f"stopped; {kept}")
        raise typer.Exit(code) from None


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Within the context, SIGTERM raises KeyboardInterrupt: it is how schedulers of clusters stop a job."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def mistake(error: Exception) -> str | None:
    """Returns the line that reports a mistake, or None for a bug."""
    if isinstance(error, UsageError):
        return _usage_line(error)
    if isinstance(error, BrokenPipeError):  # the reader left, as `head` does: nothing to report
        return None
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return place + _one_line(error.strerror or str(error) or type(error).__name__)
    if isinstance(error, (ValueError, ImportError)) and _raised_by_this_package(error):
        return _one_line(str(error))
    return None


def _usage_line(error: Exception) -> str:
    message = _one_line(error.format_message()).rstrip(".")  # type: ignore[attr-defined]
    message = message.replace("Value error, ", "")  # pydantic's, in newer versions of typer
    context = getattr(error, "ctx", None)
    hint = f"; {context.command_path} --help shows how" if message and context else ""
    return message[:1].lower() + message[1:] + hint


def _raised_by_this_package(error: Exception) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").split(".")[0] == "tokenpacker"


def _one_line(text: str) -> str:
    return " ".join(text.split())
