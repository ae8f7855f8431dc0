"""Writing a model folder: it appears whole or not at all, and its weights are never in memory all at once."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 4 * 1024**3
FULL_BYTES = 1024**2  # a disk with less room is full
SPARE_BYTES = 64 * 1024**2  # for the small files beside the weights


@contextlib.contextmanager
def new_folder(path: Path, needed_bytes: int, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, which takes the name `path` when the block ends well and vanishes when it does not.

    What a killed run has left is removed by the next one. With `overwrite` the old folder stays until the new one is
    complete.

    Raises:
        ValueError: when `path` is taken, or the disk has less room than `needed_bytes`.
        OSError: when the disk gets full meanwhile, or the place cannot be written.
    """
    path = path.expanduser().absolute()
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not overwrite)):
        raise ValueError(f"{path} exists already; choose another folder, or pass --overwrite (overwrite=True)")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    free = shutil.disk_usage(path.parent).free
    if free < needed_bytes + SPARE_BYTES:
        raise ValueError(
            f"{path.parent} has room for {free / 1e9:.1f} GB but {needed_bytes / 1e9:.1f} GB are to be written;"
            " free some, or choose another disk"
        )
    partial.mkdir()
    try:
        yield partial
        _swap(partial, path)
    except BaseException as error:
        full = _is_full_disk(error, partial)
        shutil.rmtree(partial, ignore_errors=True)
        if full:
            raise OSError(
                errno.ENOSPC, "the disk is full; nothing was kept. Free some room and run it again", str(path)
            ) from error
        raise


def _swap(partial: Path, path: Path) -> None:
    """Gives the finished folder its name; an old folder of that name goes last."""
    old = path.parent / f".{path.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(partial, path)
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


class ShardWriter:
    """Collects tensors and writes a shard whenever enough have come together; `close` writes the rest and the index.

    Args:
        stem, suffix: a lone shard is `stem + suffix`, as transformers names it.
        save: writes one shard.
    """

    def __init__(
        self,
        folder: Path,
        stem: str,
        suffix: str,
        save: Callable[[dict[str, Tensor], Path], None],
        shard_bytes: int = SHARD_BYTES,
    ):
        self.folder, self.stem, self.suffix, self.save, self.shard_bytes = folder, stem, suffix, save, shard_bytes
        self.pending: dict[str, Tensor] = {}
        self.pending_bytes = 0
        self.shards: list[list[str]] = []
        self.total_bytes = 0

    @classmethod
    def safetensors(cls, folder: Path, shard_bytes: int = SHARD_BYTES) -> ShardWriter:
        """Writes `model*.safetensors`."""
        return cls(folder, "model", ".safetensors", _save_safetensors, shard_bytes)

    @classmethod
    def bin(cls, folder: Path, shard_bytes: int = SHARD_BYTES) -> ShardWriter:
        """Writes `pytorch_model*.bin`, as the libraries of 2023 expect it."""
        return cls(folder, "pytorch_model", ".bin", torch.save, shard_bytes)

    @property
    def num_tensors(self) -> int:
        """How many were taken so far."""
        return sum(map(len, self.shards)) + len(self.pending)

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes one tensor; what does not fit the shard at hand opens the next."""
        size = tensor.numel() * tensor.element_size()
        if self.pending and self.pending_bytes + size > self.shard_bytes:
            self._flush()
        # A view of a larger storage would be stored with all of it.
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == size
        self.pending[name] = tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
        self.pending_bytes += size
        self.total_bytes += size

    def close(self) -> None:
        """Writes what is left, gives the shards their final names, and writes the index where there are several."""
        self._flush()
        count = len(self.shards)
        if count == 1:
            (self.folder / f"{self.stem}-00001{self.suffix}").rename(self.folder / f"{self.stem}{self.suffix}")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self.shards, start=1):
            final = f"{self.stem}-{number:05d}-of-{count:05d}{self.suffix}"
            (self.folder / f"{self.stem}-{number:05d}{self.suffix}").rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / f"{self.stem}{self.suffix}.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        if self.pending:
            self.save(self.pending, self.folder / f"{self.stem}-{len(self.shards) + 1:05d}{self.suffix}")
            self.shards.append(list(self.pending))
            self.pending, self.pending_bytes = {}, 0


def _save_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
