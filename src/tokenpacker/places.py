"""Folders to write and folders to read. Without torch: commands ask before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def check_apart(path: Path | str, sources: Iterable[str | Path | None]) -> None:
    """Raises ValueError if a source is the folder to write or lies in it; what is not there is no source."""
    place = Path(path).expanduser().resolve()
    for source in (Path(source).expanduser() for source in sources if source is not None):
        if source.exists() and place.exists():
            read = source.resolve()
            if any(place.samefile(folder) for folder in (read, *read.parents)):  # in whatever case it is written
                raise ValueError(f"{place} holds {source}, which is read; choose another folder to write")
