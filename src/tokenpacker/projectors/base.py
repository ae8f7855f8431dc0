"""The base classes of all projectors and their configs, the registry that finds them by name, and what serves them all.

`pack_tiles` packs tiles that have different scale factors; `save` and `load` keep a projector in one file.

Shapes: N tiles, U different tiles with features, (h, w) patch grid, T packed tokens, D language width.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from tokenpacker.features import VisionFeatures

PAPER_STD, PAPER_VISION_DIM = 0.02, 1024  # of fresh weights; see `Projector.init_weights`
ENTRY_POINT_GROUP = "tokenpacker.projectors"
CONFIG_KEY = "projector_config"  # of a projector file's header


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """Configuration of a projector. A subclass adds its own fields, and counts the packed tokens without weights.

    Args:
        vision_dim: width C of one level of vision features.
        language_dim: width D of the language model's embeddings.
        num_levels: number M of levels that `VisionFeatures.levels` holds.
    """

    name: ClassVar[str]

    vision_dim: int
    language_dim: int
    num_levels: int = 1

    def __post_init__(self) -> None:
        for field in ("vision_dim", "language_dim", "num_levels"):
            require_positive(field, getattr(self, field))

    def token_grid(self, patch_grid: tuple[int, int], scale_factor: int | None = None) -> tuple[int, int]:
        """Returns (rows, cols) of the packed tokens of one tile; `scale_factor=None` takes the config's own.

        Raises:
            ValueError: if this projector cannot use the scale factor on this grid.
        """
        raise NotImplementedError

    def num_tokens(self, patch_grid: tuple[int, int], scale_factor: int | None = None) -> int:
        """Returns T, the number of packed tokens of one tile. Raises ValueError if `token_grid` does."""
        rows, cols = self.token_grid(patch_grid, scale_factor)
        return rows * cols

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready dict, which `config_from_dict` turns back into an equal config."""
        return {"name": self.name, **dataclasses.asdict(self)}


class Projector(nn.Module):
    """Base class of all projectors: vision features in, packed tokens (N, T, D) out."""

    config: ProjectorConfig

    def forward(self, features: VisionFeatures, scale_factor: int | None = None) -> Tensor:
        """Returns packed tokens (N, T, D); T is the number that the config counts."""
        raise NotImplementedError

    def init_weights(self) -> None:
        """Initialises every linear layer: weights from a truncated normal distribution, biases with zero.

        The standard deviation is 0.02 at the paper's vision width 1024, and 0.02 * sqrt(1024/C) at width C. With 0.02,
        the output of a narrow projector is near zero at first, and the projector learns late.
        """
        init_linears(self, self.config.vision_dim)

    def check_features(self, features: VisionFeatures) -> None:
        """Raises ValueError unless these are `VisionFeatures` of the projector's widths and dtype."""
        require_features(self.config.name, features, self.config)
        given, own = features.query.dtype, {parameter.dtype for parameter in self.parameters()}
        comparable = own and all(dtype.is_floating_point for dtype in own)  # quantized layers convert by themselves
        if comparable and given not in own and not torch.is_autocast_enabled(features.query.device.type):
            expected = next(self.parameters()).dtype
            raise ValueError(
                f"features are {given} but the {self.config.name} projector is {expected}; convert one of them, for"
                f" example projector.to({given})"
            )


def init_linears(module: nn.Module, vision_dim: int) -> None:
    """Initialises every linear layer of a module; see `Projector.init_weights`."""
    std = PAPER_STD * (PAPER_VISION_DIM / vision_dim) ** 0.5
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def require_features(name: str, features: Any, config: Any) -> None:
    """Raises ValueError unless these are `VisionFeatures` with the config's `vision_dim` and `num_levels`."""
    if not isinstance(features, VisionFeatures):
        raise ValueError(
            f"{name} takes VisionFeatures, not {type(features).__name__}; make them of an encoder's hidden states with"
            " VisionFeatures.from_hidden_states, or as VisionFeatures(query, levels, patch_grid)"
        )
    for field in ("vision_dim", "num_levels"):
        given, expected = getattr(features, field), getattr(config, field)
        if given != expected:
            raise ValueError(f"features have {field}={given} but {name} was built for {field}={expected}")


def require_positive(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer of at least 1")


# name -> (config class, module class); filled by `register` alone.
_REGISTRY: dict[str, tuple[type[ProjectorConfig], type[Projector]]] = {}

ModuleClass = TypeVar("ModuleClass", bound=type[Projector])


def register(config_class: type[ProjectorConfig]) -> Callable[[ModuleClass], ModuleClass]:
    """Returns a class decorator that registers a projector under its config's name.

    Raises:
        ValueError: if the name belongs to another class.
    """

    def decorate(module_class: ModuleClass) -> ModuleClass:
        name = config_class.name
        if name in _REGISTRY and _REGISTRY[name][1].__qualname__ != module_class.__qualname__:
            raise ValueError(
                f"projector name {name!r} is taken by {_REGISTRY[name][1].__qualname__}; choose another name"
            )
        _REGISTRY[name] = (config_class, module_class)
        return module_class

    return decorate


def available() -> list[str]:
    """Returns the names of all projectors, sorted; those of installed third-party packages are included."""
    return sorted(set(_REGISTRY) | {point.name for point in entry_points(group=ENTRY_POINT_GROUP)})


def config_from_dict(values: dict[str, Any]) -> ProjectorConfig:
    """Builds a config from the dict of `to_dict`; `values["name"]` names the projector.

    Raises:
        ValueError: for an unknown name or key (the message lists the valid ones), and for a missing key.
    """
    values = dict(values)
    config_class, _ = _find(values.pop("name", None))
    valid = {field.name for field in dataclasses.fields(config_class)}
    unknown = sorted(set(values) - valid)
    if unknown:
        raise ValueError(f"unknown keys {unknown} for projector {config_class.name!r}; valid keys: {sorted(valid)}")
    missing = sorted(
        field.name
        for field in dataclasses.fields(config_class)
        if field.default is dataclasses.MISSING and field.name not in values
    )
    if missing:
        raise ValueError(f"projector {config_class.name!r} needs the keys {missing}")
    return config_class(**values)


def build(config: ProjectorConfig | dict[str, Any]) -> Projector:
    """Builds a freshly initialised projector. Raises ValueError for a dict that `config_from_dict` refuses."""
    config = config_from_dict(config) if isinstance(config, dict) else config
    _, module_class = _find(config.name)
    return module_class(config)


def _find(name: str | None) -> tuple[type[ProjectorConfig], type[Projector]]:
    """Returns the config and module class of a name. Imports a third-party package only if the name is its own."""
    if name not in _REGISTRY:
        for point in entry_points(group=ENTRY_POINT_GROUP):
            if point.name == name:
                point.load()
    if name is None or name not in _REGISTRY:
        raise ValueError(f"unknown projector {name!r}; available: {', '.join(available())}")
    return _REGISTRY[name]


def pack_tiles(
    projector: Projector,
    features: VisionFeatures,
    scale_factors: int | Sequence[int] | None = None,
    tile_index: Tensor | None = None,
) -> Tensor | list[Tensor]:
    """Returns packed tokens (N, T, D); a list of N tensors (T, D) if the tiles have different scale factors.

    The projector runs once for each scale factor, on the tiles that have it.

    Args:
        scale_factors: one for all tiles, or one for each of the N; None takes the projector's own.
        tile_index: (N,), the tile of `features` behind each packed tile; None if N = U.

    Raises:
        ValueError: if there are more or fewer scale factors than tiles, or if the projector cannot use one.
    """
    num_tiles = features.query.shape[0] if tile_index is None else tile_index.shape[0]
    if isinstance(scale_factors, Sequence):
        if len(scale_factors) != num_tiles:
            raise ValueError(
                f"{len(scale_factors)} scale factors were given for {num_tiles} tiles; pass one for each tile, as the"
                " processor does"
            )
        different = set(scale_factors)
        if len(different) > 1:
            return _pack_mixed(projector, features, scale_factors, tile_index)
        scale_factors = different.pop() if different else None
    packed = projector(features, scale_factors)  # (U, T, D)
    return packed if tile_index is None else packed[tile_index.to(packed.device)]


def _pack_mixed(
    projector: Projector, features: VisionFeatures, scale_factors: Sequence[int], tile_index: Tensor | None
) -> list[Tensor]:
    factors = torch.tensor(scale_factors)  # (N,)
    tiles = torch.arange(len(factors)) if tile_index is None else tile_index.cpu()
    packed: dict[int, Tensor] = {}
    for factor in sorted(set(scale_factors)):
        places = (factors == factor).nonzero()[:, 0]  # of the tiles with this factor
        shown, row = tiles[places].unique(return_inverse=True)
        tokens = projector(features.select(shown.to(features.query.device)), factor)  # (different tiles, T, D)
        packed |= dict(zip(places.tolist(), tokens[row.to(tokens.device)], strict=True))
    return [packed[place] for place in range(len(factors))]


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
