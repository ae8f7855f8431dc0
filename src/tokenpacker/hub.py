"""A model's name to a folder with its files: a local folder, or the cached copy of a repository on the hub."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tokenpacker.known_models import resolve

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
SECONDS = 1.5  # that the hub has to answer anything at all; the libraries would try for half a minute, for each file


def is_hub_id(name: str) -> bool:
    """Whether `name` can be a repository's name: `owner/model`."""
    return HUB_ID.fullmatch(name) is not None and ".." not in name


def check_name(name: str, remedy: str) -> None:
    """Raises ValueError for a name that is neither a folder nor can be a repository's; the hub is not asked."""
    folder = Path(name).expanduser()
    if folder.is_file():
        raise ValueError(f"model {name} is a file; {remedy}")
    if not folder.is_dir() and not is_hub_id(name):
        raise ValueError(f"model {name} does not exist; {remedy}")


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
    check_name(name, remedy)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    problem = hub_problem()
    try:
        return Path(
            snapshot_download(name, allow_patterns=list(files), revision=revision, local_files_only=problem is not None)
        )
    except RepositoryNotFoundError:
        raise ValueError(
            f"model {name} is neither a folder here nor on the hub (or it is private); check the name, or log in"
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"model {name} has no revision {revision!r} on the hub; check it") from None
    except LocalEntryNotFoundError as error:
        raise _unreachable(name, remedy, problem or type(error).__name__) from None
    except OSError as error:
        if error.errno is None:  # a library's own kind, about the network
            raise _unreachable(name, remedy, type(error).__name__) from error
        raise
    except Exception as error:  # of several network libraries
        raise _unreachable(name, remedy, type(error).__name__) from error


@cache
def hub_problem() -> str | None:
    """Why the hub cannot be reached; None where it can. It is tried once a process, for less than two seconds."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    found: list[str | None] = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=SECONDS)
            found.append(None)
        except Exception as error:  # of several network libraries
            found.append(" ".join(str(error).split()) or type(error).__name__)

    thread = threading.Thread(target=ask, daemon=True)  # looking up a name has no limit of its own
    thread.start()
    thread.join(SECONDS)
    return found[0] if found else f"no answer from {constants.ENDPOINT} in {SECONDS} seconds"


def _unreachable(name: str, remedy: str, problem: str) -> ValueError:
    return ValueError(
        f"model {name} is no folder here, and the hub cannot be reached for it ({problem});"
        f" check the name and the network, or {remedy}"
    )
