"""Loads a released checkpoint as a model of ours, or converts it to a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device

from tokenpacker.checkpoints.model_folder import (
    ADAPTER_FOLDER,
    ORIGINAL_FOLDER,
    SHARD_BYTES,
    copy_tokenizer,
    new_folder,
    write_weights,
)
from tokenpacker.checkpoints.original_checkpoint import open_checkpoint
from tokenpacker.checkpoints.weight_files import Progress
from tokenpacker.hf.model import TokenPackerForConditionalGeneration
from tokenpacker.hf.processing.llama_tokenizer import Variant
from tokenpacker.hf.processing.processor import TokenPackerProcessor

if TYPE_CHECKING:
    from peft import PeftModel

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_released(
    src: str | Path,
    *,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    merge: bool = True,
    max_tiles: int | None = None,
    tokenizer_variant: Variant | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> tuple[TokenPackerForConditionalGeneration | PeftModel, TokenPackerProcessor]:
    """Model and processor of a checkpoint in the original layout, ready to answer as the original did.

    Files are read one after another: beside the model, memory holds one of them at most.

    Args:
        src: folder or hub id of a whole checkpoint, a stage-1 folder or a LoRA folder.
        base: language model that a stage-1 or LoRA checkpoint was trained from, folder or hub id.
        vision_tower: replaces the tower that the checkpoint holds or names, folder or hub id.
        dtype: of all weights; None takes the language model's own.
        device: of the model.
        merge: for a LoRA checkpoint: add the adapter to the weights (True), or keep it and return a `PeftModel`.
        max_tiles: limit of tiles, for a config whose `patch_num` is missing or wrong.
        tokenizer_variant: `slow`, `slow_legacy` or `fast`, see `load_llama_tokenizer`; they differ from the second
            turn on. None takes the one that the checkpoint was trained with.
        revision: branch, tag or commit of `src` on the hub.
        progress: takes the bytes read so far and the bytes in all.

    Raises:
        ValueError: if files or tensors are missing, damaged, unknown, or do not fit together.
        ImportError: for an adapter that is kept, without peft.
    """
    checkpoint = open_checkpoint(
        src,
        base=base,
        vision_tower=vision_tower,
        merge=merge,
        max_tiles=max_tiles,
        tokenizer_variant=tokenizer_variant,
        revision=revision,
    )
    chosen = as_dtype(dtype) or checkpoint.config.dtype
    checkpoint.config.dtype = chosen
    with init_empty_weights(include_buffers=False):
        model = TokenPackerForConditionalGeneration(checkpoint.config)
    check_device(device)
    for name, tensor in checkpoint.tensors(chosen, progress):
        value = tensor.to(device, chosen, copy=True)  # a view would keep its file in memory
        set_module_tensor_to_device(model, name, device, value, dtype=chosen, clear_cache=False)
    model.to(device)  # buffers
    model.generation_config = checkpoint.generation_config
    model.eval()
    return (model if checkpoint.kept is None else checkpoint.kept.attach(model)), checkpoint.processor


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    merge: bool = True,
    max_tiles: int | None = None,
    tokenizer_variant: Variant | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Converts a checkpoint in the original layout to a folder that `from_pretrained` loads; returns a summary.

    The folder appears when it is complete; an interrupted conversion leaves nothing and can be run again. Memory holds
    one file of the checkpoint and one shard of the new folder at most.

    Args:
        dtype: of all weights; None keeps each tensor's own, bit for bit.
        merge: for a LoRA checkpoint: False writes the adapter for PEFT into the folder `adapter` within `dst`.
        overwrite: replace an existing folder, once the new one is complete.
        shard_bytes: limit of each file of weights.

    Further arguments and errors are those of `load_released`.

    Raises:
        OSError: when the disk gets full; nothing is kept.
    """
    checkpoint = open_checkpoint(
        src,
        base=base,
        vision_tower=vision_tower,
        merge=merge,
        max_tiles=max_tiles,
        tokenizer_variant=tokenizer_variant,
        revision=revision,
    )
    chosen = as_dtype(dtype)
    checkpoint.config.dtype = chosen or checkpoint.config.dtype
    needed = sum(entry.num_bytes(chosen) for entry in checkpoint.entries)
    with new_folder(Path(dst), needed, overwrite, [src, base, vision_tower]) as folder:
        tensors = ((name, t.to(chosen or t.dtype)) for name, t in checkpoint.tensors(chosen, progress))
        count, written = write_weights(folder, tensors, shard_bytes=shard_bytes)
        checkpoint.config.save_pretrained(folder)
        checkpoint.generation_config.save_pretrained(folder)
        checkpoint.processor.save_pretrained(folder)
        (folder / ORIGINAL_FOLDER).mkdir()
        copy_tokenizer(checkpoint.parts.tokenizer_folder, folder / ORIGINAL_FOLDER)
        if checkpoint.kept is not None:
            checkpoint.kept.save(folder / ADAPTER_FOLDER)
    return {"kind": checkpoint.parts.kind, "tensors": count, "bytes": written, "notes": list(checkpoint.parts.notes)}


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A type by its name. Raises ValueError for others than float32, float16 and bfloat16."""
    if dtype is None or dtype in DTYPES.values():
        return dtype  # type: ignore[return-value]
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    return DTYPES[str(dtype)]


def check_device(device: str | torch.device) -> None:
    """Raises ValueError for a device that does not exist."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={str(device)!r} cannot be used ({' '.join(str(error).split())[:120]})") from None
