"""The models that travel with the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


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
