"""A model's name to a folder with its files: a local folder, or the cached copy of a repository on the hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tokenpacker.known_models import resolve

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def is_hub_id(name: str) -> bool:
    """Whether `name` can be a repository's name: `owner/model`."""
    return HUB_ID.fullmatch(name) is not None and ".." not in name


def fetch(name: str, files: Sequence[str], remedy: str, revision: str | None = None) -> Path:
    """The folder called `name`, or a copy of that repository's files which match the patterns `files`.

    Carried models and released checkpoints go by their names, too.

    Args:
        remedy: ends the message when there is no such model: what the user can do.
        revision: branch, tag or commit on the hub.

    Raises:
        ValueError: when there is neither a folder nor a repository of this name, or the hub cannot be reached.
    """
    name = resolve(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ValueError(f"model {name} is a file; {remedy}")
    if not is_hub_id(name):
        raise ValueError(f"model {name} does not exist; {remedy}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(files), revision=revision))
    except RepositoryNotFoundError:
        raise ValueError(
            f"model {name} is neither a folder here nor on the hub (or it is private); check the name, or log in"
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"model {name} has no revision {revision!r} on the hub; check it") from None
    except OSError as error:
        if error.errno is None:  # a library's own kind, about the network
            raise _unreachable(name, remedy, error) from error
        raise
    except Exception as error:  # of several network libraries
        raise _unreachable(name, remedy, error) from error


def _unreachable(name: str, remedy: str, error: Exception) -> ValueError:
    return ValueError(
        f"model {name} is no folder here, and the hub cannot be reached for it ({type(error).__name__});"
        f" check the name and the network, or {remedy}"
    )
