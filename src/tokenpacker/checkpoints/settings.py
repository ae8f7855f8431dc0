"""Reads a released `config.json`: every key is used, known to have no effect, or named in a note."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig

from tokenpacker.checkpoints.weight_files import FETCH_AGAIN, refused_as
from tokenpacker.hf.processing.image_processor import ImageMode

MODEL_TYPES = ("llava", "llava_llama")
TILE_LIMITS = (9, 16, 25)  # the original has lists of grids for these
KEY_VALUE_LEVELS = (12, 16, 22, 23)  # fixed in the original, in no config

# For missing keys: the original's own default, or what its scripts always pass.
DEFAULT_SCALE_FACTOR = 2  # the branches without the key have no other
DEFAULT_TILE_LIMIT = 9  # training never writes the key
DEFAULT_QUERY_LEVEL = -2

# The original's training writes them, and nothing reads them.
WITHOUT_EFFECT = {
    "_name_or_path",
    "architectures",
    "freeze_mm_mlp_adapter",
    "image_grid_pinpoints",
    "mm_hidden_size",
    "mm_projector_lr",
    "mm_projector_type",  # seen from the tensors' names
    "mm_use_im_patch_token",  # adds a token that no prompt holds; the tokenizer's files have it
    "model_type",
    "torch_dtype",
    "transformers_version",
    "tune_mm_mlp_adapter",
    "use_mm_proj",
}
OLD_SCALE_KEY = "down_rate"  # what the original's first version called the scale factor
USED = {
    OLD_SCALE_KEY,
    "image_aspect_ratio",
    "max_sequence_length",
    "mm_use_im_start_end",
    "mm_vision_select_feature",
    "mm_vision_select_layer",
    "mm_vision_tower",
    "patch_num",
    "scale_factor",
    "vision_tower",
}
# Sizes in a config, and bounds that no model comes near: building a larger one would take hours.
SIZES = (
    "head_dim",
    "hidden_size",
    "image_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "patch_size",
    "vocab_size",
)
LARGEST_SIZE, LARGEST_DEPTH = 10**7, 1000
# Keys of a LLaMA's config, with their old spellings.
LANGUAGE_MODEL_KEYS = set(LlamaConfig().to_dict()) | {"rope_theta", "rope_scaling", "pretraining_tp"}


@dataclass(frozen=True, kw_only=True)
class ReleasedSettings:
    """A released model's settings.

    Args:
        query_level: hidden state of the vision tower for the coarse query; negative values count from the end.
        vision_tower: folder or hub id of the tower; None if the config names none.
        image_start_end: whether prompts put a start and an end token around each image.
        context_length: the tokenizer's `model_max_length`; None keeps the one in its files.
        unknown: keys of the config that no released model is known to have.
    """

    image_mode: ImageMode
    max_tiles: int
    scale_factor: int
    query_level: int
    vision_tower: str | None
    image_start_end: bool
    context_length: int | None
    unknown: tuple[str, ...]

    @classmethod
    def read(cls, config: dict[str, Any], where: str) -> ReleasedSettings:
        """The settings in a config's content; `where` names it in errors.

        Raises:
            ValueError: for another kind of model and for values that the original cannot have been trained with.
        """
        model_type = config.get("model_type")
        if model_type == "tokenpacker":
            raise ValueError(
                f"{where} is a converted model already: load it with from_pretrained or --model, or write it back with"
                " convert --to original"
            )
        if model_type not in MODEL_TYPES:
            raise ValueError(f"{where} has model_type={model_type!r}; a released TokenPacker model has 'llava'")
        _choice(config, "mm_vision_select_feature", ("patch",), where)  # all that the projector takes
        max_tiles = _integer(config, "patch_num", DEFAULT_TILE_LIMIT, where)
        vision_tower = config.get("mm_vision_tower") or config.get("vision_tower")
        if vision_tower is not None and not isinstance(vision_tower, str):
            raise ValueError(f"{where} has mm_vision_tower={vision_tower!r}; it must be a folder or hub id")
        scale_key = "scale_factor" if config.get("scale_factor") is not None else OLD_SCALE_KEY
        known = WITHOUT_EFFECT | USED | LANGUAGE_MODEL_KEYS
        return cls(
            image_mode=_choice(config, "image_aspect_ratio", ("square", "pad", "slice"), where),
            max_tiles=check_tile_limit(max_tiles, f"{where} has patch_num"),
            scale_factor=_integer(config, scale_key, DEFAULT_SCALE_FACTOR, where, minimum=1),
            query_level=_integer(config, "mm_vision_select_layer", DEFAULT_QUERY_LEVEL, where),
            vision_tower=vision_tower,
            image_start_end=_choice(config, "mm_use_im_start_end", (False, True), where),
            context_length=_integer(config, "max_sequence_length", 0, where, minimum=1) or None,
            unknown=tuple(sorted(set(config) - known)),
        )


def check_tile_limit(max_tiles: int, what: str) -> int:
    """Returns the limit. Raises ValueError for one that the original has no grids for."""
    if type(max_tiles) is not int or max_tiles not in TILE_LIMITS:
        raise ValueError(f"{what}={max_tiles!r}; the original knows {', '.join(map(str, TILE_LIMITS))}")
    return max_tiles


def check_sizes(config: dict[str, Any], where: str) -> None:
    """Raises ValueError for sizes that no model has."""
    for key in SIZES:
        value = config.get(key)
        largest = LARGEST_DEPTH if key == "num_hidden_layers" else LARGEST_SIZE
        if value is not None and (type(value) is not int or not 0 < value <= largest):
            raise ValueError(f"{where} has {key}={value!r}; it must be a whole number from 1 to {largest:,}")


def language_model_config(config: dict[str, Any], where: str) -> LlamaConfig:
    """The language model's config in that of a released model or of a LLaMA. Raises ValueError if it is wrong."""
    missing = [
        key for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size") if key not in config
    ]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}, which a language model's config has; {FETCH_AGAIN}")
    check_sizes(config, where)
    known = LANGUAGE_MODEL_KEYS - {"dtype", "torch_dtype"}  # the tensors' own types count
    with refused_as(f"{where} is no config of a LLaMA"):
        return LlamaConfig(**{key: value for key, value in config.items() if key in known})


def _choice(config: dict[str, Any], key: str, choices: tuple[Any, ...], where: str) -> Any:
    """The value of a key, the first of the choices if it is missing. Raises ValueError for any other value."""
    value = config.get(key) or choices[0]
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"{where} has {key}={value!r}; released models have {' or '.join(map(str, choices))}")
    return value


def _integer(config: dict[str, Any], key: str, default: int, where: str, minimum: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,9}", value):  # the original's command lines pass text
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or (minimum is not None and value < minimum):
        raise ValueError(
            f"{where} has {key}={value!r}; it must be a whole number{f' of at least {minimum}' if minimum else ''}"
        )
    return value
