"""The names that stand for models without a folder or an owner: carried models, and released checkpoints."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from tokenpacker.released import RELEASED_MODELS
from tokenpacker.text import did_you_mean

SHAPES = ("7b", "13b", "small")  # sizes without weights, which `speed` measures and plans
CLOSE = 0.75  # similarity from which a name counts as a misspelt one; a model of that name may exist on the hub


def resolve(name: str) -> str:
    """The folder of a carried model, the hub id of a released checkpoint; any other name as it is.

    A file or folder of that name comes first.

    Raises:
        ValueError: for a name without an owner that is nearly one of these; the message names it.
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


def is_released(name: str) -> bool:
    """Whether a name or hub id is that of a released checkpoint, which is in the original layout."""
    return any(name in (model.name, model.hub_id) for model in RELEASED_MODELS)


def carried_model_path(name: str = "tiny") -> Path:
    """Folder of a model that travels with the package.

    `tiny`; `tiny-regions`, which came from it and takes regions; `tiny-mlp`, its full-token comparison.

    Raises:
        ValueError: for a name that the package does not carry; the message lists those it does.
    """
    names = carried_models()
    if name not in names:
        raise ValueError(f"the package carries no model {name!r}; it carries: {', '.join(names) or 'none'}")
    return _folder() / name


def carried_models() -> list[str]:
    """The names of all models that travel with the package, sorted."""
    return sorted(path.name for path in _folder().iterdir() if path.is_dir()) if _folder().is_dir() else []


def _folder() -> Path:
    return Path(str(files("tokenpacker") / "models"))
