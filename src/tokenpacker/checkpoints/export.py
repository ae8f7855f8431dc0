"""A model of ours written back in the original layout: the tensors that it came from, bit for bit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig

from tokenpacker.checkpoints import tensor_names as names
from tokenpacker.checkpoints.accounts import Entry, collect, listed, read, shapes_of
from tokenpacker.checkpoints.conversion import ADAPTER_FOLDER, Progress, as_dtype
from tokenpacker.checkpoints.discovery import STAGE_1_FILE
from tokenpacker.checkpoints.model_folder import SHARD_BYTES, ShardWriter, new_folder
from tokenpacker.checkpoints.original_files import ORIGINAL_FOLDER, check_exportable, copy_tokenizer, original_config
from tokenpacker.checkpoints.weight_files import WEIGHT_TYPES, read_json, weight_files
from tokenpacker.hf.configuration import TokenPackerConfig
from tokenpacker.hf.pretrained import OLD_NAMES
from tokenpacker.hub import fetch

STORED_TYPES = {str(dtype).removeprefix("torch."): dtype for dtype in WEIGHT_TYPES.values()}
Layout = Literal["complete", "stage-1"]
SRC_REMEDY = "give the folder of a converted or trained TokenPacker model"
MODEL_FILES = ("*.json", "*.safetensors", f"{ORIGINAL_FOLDER}/*")


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
    """Writes a model folder of ours in the original layout; returns what was done.

    Weights that were cast when they were loaded get the type back that they came in, where that loses nothing.

    Args:
        src: folder or hub id that `convert` or `save_pretrained` wrote.
        layout: `complete` is what stage 2 of the original writes; `stage-1` is `mm_projector.bin` and the config.
        weights: `.bin` as the libraries of 2023 expect it, or safetensors.
        tokenizer: folder with the original `tokenizer.model`; None takes the one that the model came with.
        vision_tower: what the config names as tower; None keeps the name that the model came with.
        dtype: of all weights; None gives each tensor its own.

    Raises:
        ValueError: for models that the original layout has no place for, and for damaged folders.
        OSError: when the disk gets full; nothing is kept.
    """
    folder = fetch(str(src), MODEL_FILES, SRC_REMEDY)
    kind = read_json(folder / "config.json").get("model_type")
    if kind != TokenPackerConfig.model_type:
        raise ValueError(f"model {folder} is of the kind {kind!r}, not {TokenPackerConfig.model_type!r}; {SRC_REMEDY}")
    if layout not in ("complete", "stage-1") or weights not in ("bin", "safetensors"):
        raise ValueError(f"layout={layout!r}, weights={weights!r}: use complete or stage-1, and bin or safetensors")
    if (folder / ADAPTER_FOLDER).is_dir() and layout == "complete":
        raise ValueError(
            f"{folder} keeps a LoRA adapter beside its weights; convert its source again with --merge first"
        )
    try:
        config = TokenPackerConfig.from_pretrained(folder)
    except Exception as error:  # transformers validates with several kinds
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder / 'config.json'} is damaged ({reason}); {SRC_REMEDY}") from error
    check_exportable(config)
    processor_config = read_json(folder / "processor_config.json")
    if config.regions is not None:
        _check_regions(processor_config, layout)
    content = original_config(config, processor_config, vision_tower)
    tokenizer_folder = _tokenizer_folder(folder, config, tokenizer) if layout == "complete" else None
    entries = _entries(folder, config, layout)
    chosen = as_dtype(dtype)
    total = sum(e.num_elements * (chosen or e.dtype).itemsize for e in entries.values())
    with new_folder(Path(dst), total, overwrite, [src, tokenizer]) as new:
        if layout == "stage-1":
            tensors = dict(_released_tensors(config, entries, chosen, progress))
            torch.save(tensors, new / STAGE_1_FILE)
            content |= {"architectures": ["LlamaForCausalLM"], "tune_mm_mlp_adapter": True}
            num_tensors = len(tensors)
        else:
            writer = (ShardWriter.bin if weights == "bin" else ShardWriter.safetensors)(new, shard_bytes)
            for name, tensor in _released_tensors(config, entries, chosen, progress):
                writer.add(name, tensor)
            writer.close()
            num_tensors = writer.num_tensors
            GenerationConfig.from_model_config(config.text_config).save_pretrained(new)
        (new / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if tokenizer_folder is not None:
            copy_tokenizer(tokenizer_folder, new)
    return {"kind": layout, "tensors": num_tensors, "bytes": total, "notes": []}


def _check_regions(processor_config: dict[str, Any], layout: Layout) -> None:
    """Raises ValueError where the original would lose the region module, or read masks by another rule."""
    if layout == "stage-1":
        raise ValueError("layout='stage-1' holds the projector alone, and this model knows regions; use 'complete'")
    rule = processor_config.get("region_rule")
    if rule != "centre":
        raise ValueError(
            f"region_rule={rule!r} is not the original's, which would read the masks otherwise than this model has"
            " learned; train it with model.region_rule=centre to write it back"
        )


def _entries(folder: Path, config: TokenPackerConfig, layout: Layout) -> dict[str, Entry]:
    """Our names with what is stored of them, all that the layout takes."""
    found = {re.sub(*OLD_NAMES, name): entry for name, entry in collect(weight_files(folder)).items()}
    expected = shapes_of(config)
    wrong = [name for name in expected if name not in found or found[name].shape != expected[name]]
    unknown = sorted(set(found) - set(expected))
    if wrong or unknown:
        raise ValueError(
            f"{folder} does not fit its config; missing or of wrong shape: {listed(wrong)}; unknown: {listed(unknown)}"
        )
    inside = bool((config.released or {}).get("tower_inside", False))
    tower = (names.TOWER, names.SPARE_LAYERS)
    if layout == "stage-1":
        return {name: entry for name, entry in found.items() if name.startswith(names.PROJECTOR)}
    return {name: entry for name, entry in found.items() if inside or not name.startswith(tower)}


def _released_tensors(
    config: TokenPackerConfig, entries: dict[str, Entry], dtype: torch.dtype | None, progress: Progress | None
) -> Iterator[tuple[str, Tensor]]:
    """Released names and tensors, file by file, the buffers of 2023 at the end."""
    released = config.released or {}
    total, done = sum(entry.num_elements * entry.dtype.itemsize for entry in entries.values()), 0
    waiting: dict[str, dict[str, Tensor]] = {}
    for file in dict.fromkeys(entry.file for entry in entries.values()):
        for entry, tensor in read(file, {e.stored_name: e for e in entries.values() if e.file == file}):
            ours = re.sub(*OLD_NAMES, entry.stored_name)
            name = names.to_released(ours, config.num_vision_layers)
            assert name is not None, f"{ours} passed the accounts"
            parts = waiting.setdefault(name, {})
            parts[ours] = tensor.to(dtype) if dtype else _as_stored(tensor, _stored_dtype(ours, released))
            if len(parts) == names.num_parts(name):
                yield name, names.join(waiting.pop(name))
            done += entry.num_elements * entry.dtype.itemsize
            if progress is not None:
                progress(done, total)
    rotary = released.get("rotary_frequencies")
    if rotary and any(name.startswith(names.LANGUAGE_MODEL) for name in entries):
        values = torch.tensor(rotary["values"], dtype=torch.float64).to(STORED_TYPES[rotary["dtype"]])
        for layer in range(config.text_config.num_hidden_layers):
            yield f"model.layers.{layer}.self_attn.rotary_emb.inv_freq", values.clone()
    shape = released.get("position_ids")
    if shape and any(name.startswith(names.TOWER) for name in entries):
        ids = torch.arange(torch.Size(shape).numel()).reshape(shape)
        yield f"{names.RELEASED_TOWER}vision_model.embeddings.position_ids", ids


def _stored_dtype(name: str, released: dict[str, Any]) -> torch.dtype | None:
    """The type that a tensor of ours came in; see `accounts.dtypes_by_part`."""
    dtypes = {re.sub(*OLD_NAMES, part): dtype for part, dtype in released.get("dtypes", {}).items()}
    prefix = next((prefix for prefix in dtypes if prefix.endswith(".") and name.startswith(prefix)), "")
    return STORED_TYPES.get(dtypes.get(name, dtypes.get(prefix, "")))


def _as_stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor in its former type where that is no larger and loses nothing."""
    if dtype is None or dtype == tensor.dtype or dtype.itemsize > tensor.dtype.itemsize:
        return tensor
    cast = tensor.to(dtype)
    return cast if torch.equal(cast.to(tensor.dtype), tensor) else tensor


def _tokenizer_folder(folder: Path, config: TokenPackerConfig, given: str | Path | None) -> Path:
    """Where the original tokenizer is: given, beside the model, or where the model was converted from."""
    source = (config.released or {}).get("tokenizer")
    for place in [given] if given is not None else [folder / ORIGINAL_FOLDER, source]:
        if place is not None and (Path(place) / "tokenizer.model").is_file():
            return Path(place)
    where = f"{given} has" if given is not None else f"neither {folder / ORIGINAL_FOLDER} nor its source {source} has"
    raise ValueError(f"{where} a tokenizer.model; give the original's folder with --tokenizer (tokenizer=)")
