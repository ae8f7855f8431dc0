"""The models that travel with the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def carried_model_path(name: str = "tiny") -> Path:
    """Folder of a model that travels with the package: `tiny`, or `tiny-mlp`, its full-token comparison.

    Raises:
        ValueError: for a name that the package does not carry; the message lists those it does.
    """
    folder = Path(str(files("tokenpacker") / "models"))
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if name not in names:
        raise ValueError(f"the package carries no model {name!r}; it carries: {', '.join(names) or 'none'}")
    return folder / name
