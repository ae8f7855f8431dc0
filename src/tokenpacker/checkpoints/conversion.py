"""Released checkpoints to models of ours: in memory, or as a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from tokenpacker.checkpoints.lora import ADAPTER_FOLDER
from tokenpacker.checkpoints.model_folder import SHARD_BYTES, ShardWriter, new_folder
from tokenpacker.checkpoints.original_checkpoint import ReleasedCheckpoint, open_checkpoint
from tokenpacker.checkpoints.original_files import ORIGINAL_FOLDER, copy_tokenizer
from tokenpacker.hf.model import TokenPackerForConditionalGeneration
from tokenpacker.hf.processing.llama_tokenizer import Variant
from tokenpacker.hf.processing.processor import TokenPackerProcessor

if TYPE_CHECKING:
    from peft import PeftModel

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Progress = Callable[[int, int], None]  # takes the bytes done and the bytes in all


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
        vision_tower: takes the place of the tower that the checkpoint holds or names, folder or hub id.
        dtype: of all weights; None takes the language model's own.
        device: where the weights go.
        merge: for a LoRA checkpoint: add the adapter to the weights (True), or keep it and return a `PeftModel`.
        max_tiles: limit of tiles, where the config's `patch_num` is missing or wrong.
        tokenizer_variant: `slow`, `slow_legacy` or `fast`, see `hf.tokenizer`; they differ in multi-turn prompts. None
            takes the one that the checkpoint was trained with.
        revision: branch, tag or commit of `src` on the hub.

    Raises:
        ValueError: for whatever is missing, damaged, unknown or does not fit together.
        ImportError: for an adapter that is kept, without peft.
    """
    checkpoint = open_checkpoint(
        src,
        base=base,
        vision_tower=vision_tower,
        max_tiles=max_tiles,
        tokenizer_variant=tokenizer_variant,
        revision=revision,
    )
    chosen = as_dtype(dtype) or checkpoint.config.dtype
    checkpoint.config.dtype = chosen
    with init_empty_weights(include_buffers=False):
        model = TokenPackerForConditionalGeneration(checkpoint.config)
    check_device(device)
    for name, tensor in checkpoint.tensors(chosen, merge, _counter(checkpoint, progress), cast=False):
        _assign(model, name, tensor.to(device, chosen, copy=True))
    model.to(device)  # buffers
    model.generation_config = checkpoint.generation_config
    model.eval()
    return (model if merge else checkpoint.require_adapter().attach(model)), checkpoint.processor


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
    """Writes a checkpoint in the original layout as a folder that `from_pretrained` loads; returns what was done.

    The folder appears when it is complete; an interrupted conversion leaves nothing and can be run again. Beside
    `shard_bytes`, memory holds one file of the checkpoint at most.

    Args:
        dtype: of all weights; None keeps each tensor's own, bit for bit.
        merge: for a LoRA checkpoint: False writes the adapter for PEFT into the folder `adapter` within `dst`.
        overwrite: replace a folder that is there, once the new one is complete.
        shard_bytes: limit of each file of weights.

    Further arguments and errors are those of `load_released`.

    Raises:
        OSError: when the disk gets full; nothing is kept.
    """
    checkpoint = open_checkpoint(
        src,
        base=base,
        vision_tower=vision_tower,
        max_tiles=max_tiles,
        tokenizer_variant=tokenizer_variant,
        revision=revision,
    )
    if not merge:
        checkpoint.require_adapter()  # before anything is written
    chosen = as_dtype(dtype)
    checkpoint.config.dtype = chosen or checkpoint.config.dtype
    with new_folder(Path(dst), checkpoint.size_as(chosen), overwrite, [src, base, vision_tower]) as folder:
        writer = ShardWriter.safetensors(folder, shard_bytes)
        for name, tensor in checkpoint.tensors(chosen, merge, _counter(checkpoint, progress)):
            writer.add(name, tensor)
        writer.close()
        checkpoint.config.save_pretrained(folder)
        checkpoint.generation_config.save_pretrained(folder)
        checkpoint.processor.save_pretrained(folder)
        (folder / ORIGINAL_FOLDER).mkdir()
        copy_tokenizer(checkpoint.tokenizer_folder, folder / ORIGINAL_FOLDER)
        if not merge:
            checkpoint.require_adapter().save(folder / ADAPTER_FOLDER)
    return {
        "kind": checkpoint.kind,
        "tensors": sum(len(ours) for targets in checkpoint.targets.values() for ours in targets.values()),
        "bytes": writer.total_bytes,
        "notes": list(checkpoint.notes),
    }


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A type by its name. Raises ValueError for others than float32, float16 and bfloat16."""
    if dtype is None or dtype in DTYPES.values():
        return dtype  # type: ignore[return-value]
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    return DTYPES[str(dtype)]


def check_device(device: str | torch.device) -> None:
    """Raises ValueError for a device that is not there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={str(device)!r} cannot be used ({' '.join(str(error).split())[:120]})") from None


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Puts a tensor in the place of a parameter that has no memory yet."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=getattr(module, leaf).requires_grad))


def _counter(checkpoint: ReleasedCheckpoint, progress: Progress | None) -> Callable[[int], None] | None:
    if progress is None:
        return None
    done = 0

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress(done, checkpoint.num_bytes)

    return count
