"""Where things are printed: results on standard output, notes and errors on standard error.

Whatever the encoding of a terminal, a file or a pipe, printing never fails: what it lacks is replaced.
"""

import codecs
import io
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
REPLACED = "tokenpacker.replaced"  # name of the error handler
SIMPLER = {"█": "#", "…": "...", "×": "x", "±": "+-", "–": "-", "→": "->"}  # of what this package itself prints


def survive_any_encoding() -> None:
    """Makes standard output and error print a simpler character, or `?`, for one that their encoding lacks.

    Standard input gives bytes that are no text as lone surrogates, as Python does for arguments: the line is refused,
    and not the whole input.
    """
    codecs.register_error(REPLACED, _simpler)
    for stream, errors in ((sys.stdout, REPLACED), (sys.stderr, REPLACED), (sys.stdin, "surrogateescape")):
        if isinstance(stream, io.TextIOWrapper):  # else another program's stand-in
            stream.reconfigure(errors=errors)


def _simpler(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError), "it is set for output alone"
    return "".join(SIMPLER.get(character, "?") for character in error.object[error.start : error.end]), error.end


def check_picture(out: Path, option: str) -> None:
    """Raises ValueError for a path that no picture can be written to, before the work that it would show is done."""
    check_picture_suffix(out, option)
    if not out.parent.is_dir():
        raise ValueError(f"{option} {out}: the folder {out.parent} does not exist; create it first")


def check_picture_suffix(out: Path, option: str) -> None:
    """Raises ValueError for a path whose ending is that of no picture."""
    if out.suffix.lower() not in PICTURE_SUFFIXES:
        raise ValueError(f"{option} {out} must end in {', '.join(PICTURE_SUFFIXES)}")


def print_json(result: dict[str, Any]) -> None:
    """The one JSON object of a command called with `--json`; escaped where the output's encoding lacks a character."""
    text = json.dumps(result, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(result)
    typer.echo(text)


def print_note(text: str) -> None:
    """Something worth knowing beside the result."""
    typer.secho(text, err=True, dim=True)


def print_error(line: str) -> None:
    """What went wrong and the remedy."""
    typer.echo(f"{typer.style('error:', fg='red', bold=True)} {line}", err=True)


def print_piece(text: str) -> None:
    """A piece of a streamed answer, at once and without a newline."""
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def image_notes_on_stderr() -> Iterator[None]:
    """Within the context, what `load_image` has to say about an image is printed as a plain note."""
    from tokenpacker.images import ImageNote

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ImageNote)
        yield
    for warning in caught:
        if issubclass(warning.category, ImageNote):
            print_note(f"note: {warning.message}")
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
