"""A released model's vision tower: its config, and its folder if the checkpoint does not hold its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from tokenpacker.checkpoints import tensor_names as names
from tokenpacker.checkpoints.settings import check_sizes
from tokenpacker.checkpoints.weight_files import read_json, refused_as
from tokenpacker.hub import fetch

TOWER_FILES = ("*.json", "model*.safetensors", "pytorch_model*.bin")
OPENAI_HEAD_DIM = 64  # of every CLIP that OpenAI released
REMEDY = "give the tower's folder or hub id with --vision-tower (vision_tower=)"


@dataclass(frozen=True)
class VisionTower:
    """A vision tower. `folder` is None if nothing but the shapes of its tensors is known."""

    config: CLIPVisionConfig
    folder: Path | None
    image_mean: list[float]
    image_std: list[float]


def open_tower(name: str | None, weights_needed: bool) -> VisionTower | None:
    """The tower called `name`: a folder, or a hub id that is fetched if its weights are needed.

    Returns None for a tower that is not on this machine and whose weights are not needed.

    Raises:
        ValueError: if the weights are needed and cannot be had, and for a folder of another kind of model.
    """
    if name is None and weights_needed:
        raise ValueError(f"the checkpoint neither holds a vision tower nor names one; {REMEDY}")
    if name is None or not (weights_needed or Path(name).expanduser().is_dir()):
        return None
    folder = fetch(name, TOWER_FILES, REMEDY)
    content = read_json(folder / "config.json")
    vision = content.get("vision_config") if content.get("model_type") == "clip" else content
    if not isinstance(vision, dict) or content.get("model_type") not in ("clip", "clip_vision_model"):
        raise ValueError(f"{folder} is of the kind {content.get('model_type')!r}; the tower must be a CLIP; {REMEDY}")
    where = str(folder / "config.json")
    check_sizes(vision, where)
    known = set(CLIPVisionConfig().to_dict()) - {"model_type", "dtype", "torch_dtype"}
    with refused_as(f"{where} is no config of a CLIP"):
        config = CLIPVisionConfig(**{key: value for key, value in vision.items() if key in known and value is not None})
    preprocessor = folder / "preprocessor_config.json"
    images: dict[str, Any] = read_json(preprocessor) if preprocessor.is_file() else {}
    return VisionTower(
        config,
        folder,
        _statistics(images.get("image_mean", list(OPENAI_CLIP_MEAN)), f"{preprocessor} has image_mean"),
        _statistics(images.get("image_std", list(OPENAI_CLIP_STD)), f"{preprocessor} has image_std", positive=True),
    )


def _statistics(values: Any, what: str, positive: bool = False) -> list[float]:
    numbers = values if isinstance(values, list) else []
    fine = [value for value in numbers if type(value) in (int, float) and math.isfinite(value)]
    if len(numbers) != 3 or len(fine) != 3 or (positive and min(fine) <= 0):
        raise ValueError(f"{what}={values!r}; it must be three {'positive ' if positive else ''}numbers")
    return [float(value) for value in fine]


def tower_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> VisionTower:
    """The tower that a checkpoint holds, by the shapes of its tensors.

    What shapes do not tell is as in OpenAI's CLIP, which all released models have: quick GELU, heads of width 64,
    eps 1e-5, mean and deviation of the pixels.

    Raises:
        ValueError: if the tensors are not those of a CLIP.
    """
    prefix = f"{names.RELEASED_TOWER}vision_model."
    try:
        width, channels, patch_size, _ = shapes[f"{prefix}embeddings.patch_embedding.weight"]
        positions, _ = shapes[f"{prefix}embeddings.position_embedding.weight"]
        mlp_width, _ = shapes[f"{prefix}encoder.layers.0.mlp.fc1.weight"]
    except (KeyError, ValueError) as error:
        raise ValueError(f"the checkpoint's vision tower is not a CLIP ({error}); {REMEDY}") from None
    layers = {
        name.removeprefix(f"{prefix}encoder.layers.").split(".")[0] for name in shapes if ".encoder.layers." in name
    }
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=mlp_width,
        num_hidden_layers=len(layers),
        num_attention_heads=max(1, width // OPENAI_HEAD_DIM),
        num_channels=channels,
        patch_size=patch_size,
        image_size=round((positions - 1) ** 0.5) * patch_size,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
    )
    return VisionTower(config, None, list(OPENAI_CLIP_MEAN), list(OPENAI_CLIP_STD))
