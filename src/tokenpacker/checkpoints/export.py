"""Writes a model of ours in the original layout: its tensors bit for bit as they came, its config, its tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig

from tokenpacker.checkpoints import tensor_names as names
from tokenpacker.checkpoints.conversion import as_dtype
from tokenpacker.checkpoints.discovery import STAGE_1_FILE
from tokenpacker.checkpoints.model_folder import (
    ADAPTER_FOLDER,
    ORIGINAL_FOLDER,
    SHARD_BYTES,
    copy_tokenizer,
    new_folder,
    write_weights,
)
from tokenpacker.checkpoints.settings import KEY_VALUE_LEVELS, LANGUAGE_MODEL_KEYS, ReleasedSettings
from tokenpacker.checkpoints.weight_files import (
    WEIGHT_TYPES,
    Entry,
    Progress,
    listed,
    read,
    read_json,
    refused_as,
    stored_entries,
    weight_files,
)
from tokenpacker.hf.configuration import TokenPackerConfig
from tokenpacker.hf.pretrained import OLD_NAMES
from tokenpacker.hub import fetch

TYPES_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in WEIGHT_TYPES.values()}
SRC_REMEDY = "give the folder of a converted or trained TokenPacker model"
MODEL_FILES = ("*.json", "*.safetensors", f"{ORIGINAL_FOLDER}/*")
RELEASED_HEADS = 8  # of the projector's attention, fixed in the original
Layout = Literal["complete", "stage-1"]


def export_original(
    src: str | Path,
    dst: str | Path,
    *,
    layout: Layout = "complete",
    weights: Literal["bin", "safetensors"] = "bin",
    tokenizer: str | Path | None = None,
    vision_tower: str | None = None,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes a model folder of ours in the original layout; returns a summary.

    Weights that were cast when they were loaded get the type back that they came in, if that loses nothing.

    Args:
        src: folder or hub id that `convert` or `save_pretrained` wrote.
        layout: `complete` is what stage 2 of the original writes; `stage-1` is `mm_projector.bin` and the config.
        weights: `.bin`, which the libraries of 2023 expect, or safetensors.
        tokenizer: folder with the original `tokenizer.model`; None takes the one that the model came with.
        vision_tower: name of the tower in the config; None keeps the name that the model came with.
        dtype: of all weights; None gives each tensor its own.
        overwrite: replace an existing folder, once the new one is complete.
        shard_bytes: limit of each file of weights.
        progress: takes the bytes read so far and the bytes in all.

    Raises:
        ValueError: for models that the original layout has no place for, and for damaged folders.
        OSError: when the disk gets full; nothing is kept.
    """
    if layout not in ("complete", "stage-1") or weights not in ("bin", "safetensors"):
        raise ValueError(f"layout={layout!r}, weights={weights!r}: use complete or stage-1, and bin or safetensors")
    folder = fetch(str(src), MODEL_FILES, SRC_REMEDY)
    config = _read_config(folder)
    processor_config = read_json(folder / "processor_config.json")
    _check_exportable(folder, config, processor_config, layout)
    content = _original_config(config, processor_config, vision_tower)
    tokenizer_folder = _tokenizer_folder(folder, config, tokenizer) if layout == "complete" else None
    entries = _entries(folder, config, layout)
    chosen = as_dtype(dtype)
    total = sum(entry.num_bytes(chosen) for entry in entries)
    tensors = _released_tensors(config, entries, chosen, progress)
    with new_folder(Path(dst), total, overwrite, [src, tokenizer]) as new:
        if tokenizer_folder is None:
            projector = dict(tensors)
            torch.save(projector, new / STAGE_1_FILE)
            content |= {"architectures": ["LlamaForCausalLM"], "tune_mm_mlp_adapter": True}
            num_tensors = len(projector)
        else:
            num_tensors, _ = write_weights(new, tensors, weights, shard_bytes)
            GenerationConfig.from_model_config(config.text_config).save_pretrained(new)
            copy_tokenizer(tokenizer_folder, new)
        (new / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return {"kind": layout, "tensors": num_tensors, "bytes": total, "notes": []}


def _read_config(folder: Path) -> TokenPackerConfig:
    kind = read_json(folder / "config.json").get("model_type")
    if kind != TokenPackerConfig.model_type:
        raise ValueError(f"model {folder} is of the kind {kind!r}, not {TokenPackerConfig.model_type!r}; {SRC_REMEDY}")
    with refused_as(f"{folder / 'config.json'} is damaged", f"; {SRC_REMEDY}"):
        return TokenPackerConfig.from_pretrained(folder)


def _check_exportable(
    folder: Path, config: TokenPackerConfig, processor_config: dict[str, Any], layout: Layout
) -> None:
    """Raises ValueError for a model that the original cannot hold: it knows one architecture and one region rule."""
    if (folder / ADAPTER_FOLDER).is_dir() and layout == "complete":
        raise ValueError(
            f"{folder} keeps a LoRA adapter beside its weights; convert its source again with --merge first"
        )
    projector = config.projector_config
    needed = {
        "vision tower": (config.vision_config.model_type, "clip_vision_model"),
        "language model": (config.text_config.model_type, "llama"),
        "projector": (projector["name"], "token-packer"),
        "projector beyond the paper": (getattr(config.projector, "beyond_the_paper", "") or None, None),
        "projector heads": (projector.get("num_heads"), RELEASED_HEADS),
        "vision_levels": (tuple(config.vision_levels), KEY_VALUE_LEVELS),
        "attention_bias": (bool(getattr(config.text_config, "attention_bias", False)), False),
        "mlp_bias": (bool(getattr(config.text_config, "mlp_bias", False)), False),
    }
    wrong = [f"{part} is {value}, must be {must}" for part, (value, must) in needed.items() if value != must]
    if wrong:
        raise ValueError(f"the original layout has no place for this model: {'; '.join(wrong)}")
    rule = processor_config.get("region_rule")
    if config.regions is not None and layout == "stage-1":
        raise ValueError("layout='stage-1' holds the projector alone, and this model knows regions; use 'complete'")
    if config.regions is not None and rule != "centre":
        raise ValueError(
            f"region_rule={rule!r} is not the original's, which would read the masks otherwise than this model has"
            " learned; train it with model.region_rule=centre to write it back"
        )


def _original_config(
    config: TokenPackerConfig, processor_config: dict[str, Any], vision_tower: str | None
) -> dict[str, Any]:
    """The content of the original's config.json: as it came, with what has changed since.

    Raises:
        ValueError: if no vision tower is known, or the processor's settings do not exist there.
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
    num_levels = config.vision_config.num_hidden_layers + 1  # with that of the embeddings
    mode = before.image_mode if config.regions is None else "slice"  # with regions the config's has no effect
    now = {
        "image_aspect_ratio": (mode, images.get("image_mode", mode)),
        "patch_num": (before.max_tiles, images.get("max_tiles", before.max_tiles)),
        "scale_factor": (before.scale_factor, config.projector_config["scale_factor"]),
        "mm_vision_select_layer": (before.query_level % num_levels, config.vision_query_level),
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


def _tokenizer_folder(folder: Path, config: TokenPackerConfig, given: str | Path | None) -> Path:
    """The original tokenizer's folder: given, within the model's, or where the model was converted from."""
    source = (config.released or {}).get("tokenizer")
    for place in [given] if given is not None else [folder / ORIGINAL_FOLDER, source]:
        if place is not None and (Path(place) / "tokenizer.model").is_file():
            return Path(place)
    where = f"{given} has" if given is not None else f"neither {folder / ORIGINAL_FOLDER} nor its source {source} has"
    raise ValueError(f"{where} a tokenizer.model; give the original's folder with --tokenizer (tokenizer=)")


def _entries(folder: Path, config: TokenPackerConfig, layout: Layout) -> list[Entry]:
    """The stored tensors that the layout takes, with our names in them."""
    stored = stored_entries(weight_files(folder)).values()
    found = {ours: replace(entry, ours=(ours,)) for entry in stored for ours in [re.sub(*OLD_NAMES, entry.name)]}
    expected = names.shapes_of(config)
    wrong = [name for name in expected if name not in found or found[name].shape != expected[name]]
    unknown = set(found) - set(expected)
    if wrong or unknown:
        raise ValueError(
            f"{folder} does not fit its config; missing or of wrong shape: {listed(wrong)}; unknown: {listed(unknown)}"
        )
    if layout == "stage-1":
        return [entry for name, entry in found.items() if name.startswith(names.PROJECTOR)]
    inside = bool((config.released or {}).get("tower_inside", False))
    tower = (names.TOWER, names.SPARE_LAYERS)
    return [entry for name, entry in found.items() if inside or not name.startswith(tower)]


def _released_tensors(
    config: TokenPackerConfig, entries: list[Entry], dtype: torch.dtype | None, progress: Progress | None
) -> Iterator[tuple[str, Tensor]]:
    """Released names and tensors, file by file, then the buffers that the libraries of 2023 stored."""
    released, num_layers = config.released or {}, config.num_vision_layers
    dtypes = {re.sub(*OLD_NAMES, part): TYPES_BY_NAME.get(name) for part, name in released.get("dtypes", {}).items()}
    waiting: dict[str, Tensor] = {}  # by our names, until all parts of the released tensor are there
    for entry, tensor in read(entries, progress):
        (ours,) = entry.ours
        name = names.to_released(ours, num_layers)
        assert name is not None, f"{ours} is a name of our model"
        waiting[ours] = tensor.to(dtype) if dtype else _as_it_came(ours, tensor, dtypes)
        parts = names.from_released(name, num_layers)
        if all(part in waiting for part in parts):
            tensors = [waiting.pop(part) for part in parts]
            yield name, torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    rotary = released.get("rotary_frequencies")
    if rotary and any(entry.ours[0].startswith(names.LANGUAGE_MODEL) for entry in entries):
        values = torch.tensor(rotary["values"], dtype=torch.float64).to(TYPES_BY_NAME[rotary["dtype"]])
        for layer in range(config.text_config.num_hidden_layers):
            yield f"model.layers.{layer}.self_attn.rotary_emb.inv_freq", values.clone()
    shape = released.get("position_ids")
    if shape and any(entry.ours[0].startswith(names.TOWER) for entry in entries):
        ids = torch.arange(torch.Size(shape).numel()).reshape(shape)
        yield f"{names.RELEASED_TOWER}vision_model.embeddings.position_ids", ids


def _as_it_came(name: str, tensor: Tensor, dtypes: Mapping[str, torch.dtype | None]) -> Tensor:
    """The tensor in the type that it came in, if that is no larger and loses nothing; see `storage_record`."""
    part = next((part for part in dtypes if part.endswith(".") and name.startswith(part)), "")
    dtype = dtypes.get(name, dtypes.get(part))
    if dtype is None or dtype == tensor.dtype or dtype.itemsize > tensor.dtype.itemsize:
        return tensor
    cast = tensor.to(dtype)
    return cast if torch.equal(cast.to(tensor.dtype), tensor) else tensor
