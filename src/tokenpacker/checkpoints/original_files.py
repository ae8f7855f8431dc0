"""What the way back needs beside tensors: the original's config from ours, and its tokenizer's files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tokenpacker.checkpoints.settings import KEY_VALUE_LEVELS, LANGUAGE_MODEL_KEYS, ReleasedSettings
from tokenpacker.hf.configuration import TokenPackerConfig

ORIGINAL_FOLDER = "original"  # within a converted model: the tokenizer's files as they came
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
)
RELEASED_HEADS = 8


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the tokenizer's files as they are."""
    for file in TOKENIZER_FILES:
        if (source / file).is_file():
            shutil.copyfile(source / file, target / file)


def check_exportable(config: TokenPackerConfig) -> None:
    """Raises ValueError for a model that the original code cannot be: it knows one architecture."""
    projector = config.projector_config
    needed = {
        "vision tower": (config.vision_config.model_type, "clip_vision_model"),
        "language model": (config.text_config.model_type, "llama"),
        "projector": (projector["name"], "token-packer"),
        "projector heads": (projector.get("num_heads"), RELEASED_HEADS),
        "vision_levels": (tuple(config.vision_levels), KEY_VALUE_LEVELS),
        "attention_bias": (bool(getattr(config.text_config, "attention_bias", False)), False),
        "mlp_bias": (bool(getattr(config.text_config, "mlp_bias", False)), False),
    }
    wrong = [f"{part} is {value}, must be {must}" for part, (value, must) in needed.items() if value != must]
    if wrong:
        raise ValueError(f"the original layout has no place for this model: {'; '.join(wrong)}")


def original_config(
    config: TokenPackerConfig, processor_config: dict[str, Any], vision_tower: str | None = None
) -> dict[str, Any]:
    """The content of the original's config.json: as it came, with what has changed since.

    Raises:
        ValueError: when no vision tower is known, or the processor's settings do not exist there.
    """
    content = dict((config.released or {}).get("config") or _fresh_config(config))
    content |= {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "tune_mm_mlp_adapter": False}
    if vision_tower is not None:
        content["mm_vision_tower"] = vision_tower
    if not content.get("mm_vision_tower"):
        raise ValueError(
            "the original's config names the vision tower; give its name with --vision-tower (vision_tower=)"
        )
    images = processor_config.get("image_processor", {})
    before = ReleasedSettings.read(content, "the original config")
    last = config.vision_config.num_hidden_layers + 1  # hidden states, the embeddings' included
    mode = before.image_mode if config.regions is None else "slice"  # with regions the config's does not count
    now = {
        "image_aspect_ratio": (mode, images.get("image_mode", mode)),
        "patch_num": (before.max_tiles, images.get("max_tiles", before.max_tiles)),
        "scale_factor": (before.scale_factor, config.projector_config["scale_factor"]),
        "mm_vision_select_layer": (before.query_level % last, config.vision_query_level),
    }
    content |= {key: new for key, (old, new) in now.items() if old != new}
    content["vocab_size"] = config.text_config.vocab_size
    ReleasedSettings.read(content, "the model")  # refuses what the original does not know
    return content


def _fresh_config(config: TokenPackerConfig) -> dict[str, Any]:
    """A config for a model that did not come from the original."""
    text = {key: value for key, value in config.text_config.to_dict().items() if key in LANGUAGE_MODEL_KEYS}
    rope = text.pop("rope_parameters", None) or {}
    dtype = str(text.pop("dtype", None) or "float32").removeprefix("torch.")
    return text | {
        "rope_theta": rope.get("rope_theta", 10000.0),
        "torch_dtype": dtype,
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_projector_type": "tokenpacker",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": config.vision_query_level - config.vision_config.num_hidden_layers - 1,
        "scale_factor": config.projector_config["scale_factor"],
        "use_mm_proj": True,
    }
