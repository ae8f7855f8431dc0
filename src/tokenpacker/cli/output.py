"""Where things are printed: results on standard output, notes and errors on standard error.

Printing never fails on the encoding of a terminal, a file or a pipe: a character that it lacks is replaced.
"""

import codecs
import io
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

REPLACED = "tokenpacker.replaced"  # name of the error handler
SIMPLER = {"█": "#", "…": "...", "×": "x", "±": "+-", "–": "-", "→": "->"}  # characters that this package prints


def survive_any_encoding() -> None:
    """Makes standard output and error print a simpler character, or `?`, for one that their encoding lacks.

    Standard input gives bytes that are not UTF-8 as lone surrogates, as Python does for arguments, so that one bad
    line is refused and not the whole input.
    """
    codecs.register_error(REPLACED, _simpler)
    for stream, errors in ((sys.stdout, REPLACED), (sys.stderr, REPLACED), (sys.stdin, "surrogateescape")):
        if isinstance(stream, io.TextIOWrapper):  # another program may have put its own object there
            stream.reconfigure(errors=errors)


def _simpler(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError), "it is set for output alone"
    return "".join(SIMPLER.get(character, "?") for character in error.object[error.start : error.end]), error.end


def print_result(as_json: bool, result: dict[str, Any], text: str) -> None:
    """Prints what a command found: as one JSON object, or as text."""
    if as_json:
        print_json(result)
    else:
        typer.echo(text)


def print_json(result: dict[str, Any]) -> None:
    """Prints the one JSON object of a command called with `--json`, escaped if the encoding lacks a character."""
    text = json.dumps(result, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(result)
    typer.echo(text)


def print_note(text: str) -> None:
    """Prints something worth knowing beside the result."""
    typer.secho(text, err=True, dim=True)


def print_error(line: str) -> None:
    """Prints what went wrong and the remedy."""
    typer.echo(f"{typer.style('error:', fg='red', bold=True)} {line}", err=True)


def print_piece(text: str) -> None:
    """Prints a piece of a streamed answer, at once and without a newline."""
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def image_notes_on_stderr() -> Iterator[None]:
    """Within the context, warnings of `load_image` about an image are printed as plain notes."""
    from tokenpacker.images import ImageNote

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ImageNote)
        yield
    for warning in caught:
        if issubclass(warning.category, ImageNote):
            print_note(f"note: {warning.message}")
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
