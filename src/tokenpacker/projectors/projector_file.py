"""A projector in one safetensors file, with its config in the file's header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tokenpacker.projectors.base import Projector, ProjectorConfig, build, config_from_dict

CONFIG_KEY = "projector_config"


def save(config: ProjectorConfig, weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Writes a projector's config and its weights, named as in its `state_dict`.

    Raises:
        ImportError: if safetensors is not installed; it comes with transformers.
    """
    from safetensors.torch import save_file

    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(contiguous, path, metadata={"format": "pt", CONFIG_KEY: json.dumps(config.to_dict())})


def load(path: str | Path) -> Projector:
    """Returns the projector that `save` wrote, on the CPU, in the dtype of the file.

    Raises:
        ValueError: if the file is missing or damaged, or holds no projector.
        ImportError: if safetensors is not installed.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            content = (file.metadata() or {}).get(CONFIG_KEY)
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise ValueError(f"projector file {path} cannot be read ({error}); check the path, or write it anew") from None
    if content is None:
        raise ValueError(f"{path} holds no projector of this package; `tokenpacker convert` reads the original's")
    projector = build(config_from_dict(json.loads(content)))
    try:
        projector.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the weights in {path} are not those of its config: {' '.join(str(error).split())}") from None
    return projector.to(next(iter(weights.values())).dtype)
