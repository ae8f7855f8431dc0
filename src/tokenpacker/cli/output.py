"""Where things are printed: results on standard output, notes and errors on standard error."""

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def check_picture(out: Path, option: str) -> None:
    """Raises ValueError for a path that no picture can be written to, before the work that it would show is done."""
    if out.suffix.lower() not in PICTURE_SUFFIXES:
        raise ValueError(f"{option} {out} must end in {', '.join(PICTURE_SUFFIXES)}")
    if not out.parent.is_dir():
        raise ValueError(f"{option} {out}: the folder {out.parent} does not exist; create it first")


def print_json(result: dict[str, Any]) -> None:
    """The one JSON object of a command called with `--json`."""
    typer.echo(json.dumps(result, ensure_ascii=False))


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
