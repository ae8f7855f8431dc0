"""Writes a model folder: it appears whole or not at all, and its weights are never in memory all at once."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tokenpacker.places import check_apart
from tokenpacker.whole_files import locked

SHARD_BYTES = 4 * 1024**3
FULL_BYTES = 1024**2  # a disk with less room is full
SPARE_BYTES = 64 * 1024**2  # for the small files beside the weights

ADAPTER_FOLDER = "adapter"  # in a converted model that keeps its LoRA adapter
ORIGINAL_FOLDER = "original"  # in a converted model: the tokenizer's files as they came
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
)


@contextlib.contextmanager
def new_folder(
    path: Path, needed_bytes: int, overwrite: bool = False, sources: Iterable[str | Path | None] = ()
) -> Iterator[Path]:
    """A folder to write into. It gets the name `path` when the block ends, and is removed if the block fails.

    The next run removes what a killed one has left. With `overwrite` the old folder stays until the new one is
    complete.

    Args:
        sources: folders that the block reads; none may lie in the place that is written.

    Raises:
        ValueError: if `path` is taken or being written, holds a source, or the disk has less room than needed.
        OSError: if the disk gets full meanwhile, or the place cannot be written.
    """
    path = path.expanduser().resolve()
    _check_place(path, overwrite, sources)
    _check_room(path, needed_bytes)
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.partial"
    try:
        taken = f"another process is writing {path}; wait for it, or choose another folder"
        with locked(path.parent / f".{path.name}.lock", taken):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                yield partial
                _swap(partial, path, overwrite)
            except BaseException as error:
                full = _is_full_disk(error, partial)
                shutil.rmtree(partial, ignore_errors=True)
                if full:
                    message = "the disk is full; nothing was kept. Free some room and run it again"
                    raise OSError(errno.ENOSPC, message, str(path)) from error
                raise
    except BaseException:
        for parent in made:
            with contextlib.suppress(OSError):  # not empty: somebody else uses it by now
                parent.rmdir()
        raise


def _check_place(path: Path, overwrite: bool, sources: Iterable[str | Path | None]) -> None:
    check_apart(path, sources)
    if os.path.ismount(path):
        raise ValueError(f"{path} is where a disk is mounted and cannot be replaced; choose a folder within it")
    if not path.exists():
        return
    taken = not path.is_dir() or any(path.iterdir())
    if taken and not overwrite:
        raise ValueError(f"{path} exists already; choose another folder, or pass --overwrite (overwrite=True)")
    if taken and not (path / "config.json").is_file():
        raise ValueError(f"{path} is no model's folder and is not replaced; choose another, or remove it yourself")


def _check_room(path: Path, needed_bytes: int) -> None:
    disk = next(parent for parent in path.parents if parent.exists())
    free, needed = shutil.disk_usage(disk).free, needed_bytes + SPARE_BYTES
    if free < needed:
        raise ValueError(
            f"{disk} has room for {free / 1e6:,.0f} MB but {needed / 1e6:,.0f} MB are needed; free some, or choose"
            " another disk"
        )


def _swap(partial: Path, path: Path, overwrite: bool) -> None:
    """Gives the finished folder its name; an old folder of that name goes last."""
    old = path.parent / f".{path.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if overwrite and path.exists():
        os.replace(path, old)
    try:
        os.replace(partial, path)  # replaces an empty folder, and no other
    except BaseException:
        if old.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _is_full_disk(error: BaseException, place: Path) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # The libraries that write weights wrap the system's error, or swallow it.
    wrapped = isinstance(error, (SafetensorError, RuntimeError))
    return wrapped and ("No space left" in str(error) or shutil.disk_usage(place).free < FULL_BYTES)


def write_weights(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    weights: Literal["bin", "safetensors"] = "safetensors",
    shard_bytes: int = SHARD_BYTES,
) -> tuple[int, int]:
    """Writes tensors as they come, in shards with the names that transformers gives them; returns count and bytes.

    Memory holds one shard. `save_torch_state_dict` of huggingface_hub needs all tensors at once, and
    `split_torch_state_dict_into_shards` all sizes, which the way back knows only after it has read the tensors.
    """
    stem, suffix = ("model", ".safetensors") if weights == "safetensors" else ("pytorch_model", ".bin")
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    pending_bytes = total = 0

    def write_pending() -> None:
        path = folder / f"{stem}-{len(shards) + 1:05d}{suffix}"
        if weights == "safetensors":
            save_file(pending, path, metadata={"format": "pt"})
        else:
            torch.save(pending, path)
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending and pending_bytes + size > shard_bytes:
            write_pending()
            pending_bytes = 0
        # A view of a larger storage would be stored with all of it.
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == size
        pending[name] = tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
        pending_bytes += size
        total += size
    write_pending()
    _name_shards(folder, stem, suffix, shards, total)
    return sum(map(len, shards)), total


def _name_shards(folder: Path, stem: str, suffix: str, shards: list[list[str]], num_bytes: int) -> None:
    """Gives shards the names that tell how many there are, and writes their index; a single one needs neither."""
    count = len(shards)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        final = f"{stem}{suffix}" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}{suffix}"
        (folder / f"{stem}-{number:05d}{suffix}").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    if count > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index, indent=2) + "\n")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the tokenizer's files as they are."""
    for file in TOKENIZER_FILES:
        if (source / file).is_file():
            shutil.copyfile(source / file, target / file)
