"""A model's name to its files: a local folder, a model of this package, a released checkpoint, or the hub.

Imports no torch: the command line resolves names before it loads anything.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tokenpacker.released import RELEASED_MODELS
from tokenpacker.text import did_you_mean

CARRIED_FOLDER = Path(__file__).with_name("models")
SHAPES = ("7b", "13b", "small")  # sizes without weights, which `speed` measures and plans
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")  # model, or owner/model
CLOSE = 0.75  # similarity from which a name counts as a misspelt one; a model of that name may exist on the hub
SECONDS = 1.5  # that the hub has to answer anything at all; the libraries would try for half a minute, for each file


def carried_models() -> list[str]:
    """Returns the names of all models that the package contains, sorted."""
    return sorted(path.name for path in CARRIED_FOLDER.iterdir() if path.is_dir()) if CARRIED_FOLDER.is_dir() else []


def carried_model_path(name: str = "tiny") -> Path:
    """Returns the folder of a model that the package contains.

    Args:
        name: `tiny`; `tiny-regions`, trained further from it, which takes regions; or `tiny-mlp`, which keeps all
            tokens, for comparisons.

    Raises:
        ValueError: for any other name.
    """
    names = carried_models()
    if name not in names:
        raise ValueError(f"the package carries no model {name!r}; it carries: {', '.join(names) or 'none'}")
    return CARRIED_FOLDER / name


def is_released(name: str) -> bool:
    """Whether `name` is the name or the hub id of a released checkpoint, whose files have the original layout."""
    return any(name in (model.name, model.hub_id) for model in RELEASED_MODELS)


def resolve(name: str) -> str:
    """Returns the folder of a carried model or the hub id of a released checkpoint; any other name unchanged.

    A local file or folder of that name comes first.

    Raises:
        ValueError: for a name without an owner that is close to one of these names; the message suggests it.
    """
    if Path(name).expanduser().exists():
        return name
    if name in carried_models():
        return str(carried_model_path(name))
    released = {model.name: model.hub_id for model in RELEASED_MODELS if model.hub_id is not None}
    if name in released:
        return released[name]
    meant = did_you_mean(name, [*carried_models(), *released], CLOSE)
    if meant and "/" not in name:
        raise ValueError(f"model {name} does not exist{meant}")
    return name


def check_name(name: str, remedy: str) -> None:
    """Raises ValueError if `name` is neither a folder nor a possible repository name. Does not ask the hub."""
    folder = Path(name).expanduser()
    if folder.is_file():
        raise ValueError(f"model {name} is a file; {remedy}")
    can_be_repository = HUB_ID.fullmatch(name) is not None and ".." not in name
    if not folder.is_dir() and not can_be_repository:
        raise ValueError(f"model {name} does not exist; {remedy}")


def fetch(name: str, patterns: Sequence[str], remedy: str, revision: str | None = None) -> Path:
    """Returns the folder of a model; from the hub, a local copy of the repository's files that match `patterns`.

    Args:
        name: as `resolve` takes it.
        remedy: ends the error message, and tells the user what to do.
        revision: branch, tag or commit on the hub.

    Raises:
        ValueError: if no folder or repository has this name, or if the hub cannot be reached.
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
            snapshot_download(name, allow_patterns=list(patterns), revision=revision, local_files_only=bool(problem))
        )
    except RepositoryNotFoundError:
        raise ValueError(
            f"model {name} is neither a folder here nor on the hub (or it is private); check the name, or log in"
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"model {name} has no revision {revision!r} on the hub; check it") from None
    except Exception as error:  # of several network libraries
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of this machine, such as a full disk
        found_nothing = isinstance(error, LocalEntryNotFoundError)
        raise ValueError(
            f"model {name} is no folder here, and the hub cannot be reached for it"
            f" ({problem or type(error).__name__}); check the name and the network, or {remedy}"
        ) from (None if found_nothing else error)


@cache
def hub_problem() -> str | None:
    """Returns why the hub cannot be reached, or None if it can. Tries once a process, for less than two seconds."""
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
