"""Writing a model folder: it appears whole or not at all, and its weights are never in memory all at once."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows: two writers of one folder are then not told apart
    fcntl = None  # type: ignore[assignment]

SHARD_BYTES = 4 * 1024**3
FULL_BYTES = 1024**2  # a disk with less room is full
SPARE_BYTES = 64 * 1024**2  # for the small files beside the weights


@contextlib.contextmanager
def new_folder(
    path: Path, needed_bytes: int, overwrite: bool = False, sources: Iterable[str | Path | None] = ()
) -> Iterator[Path]:
    """A folder to write into, which takes the name `path` when the block ends well and vanishes when it does not.

    What a killed run has left is removed by the next one. With `overwrite` the old folder stays until the new one is
    complete.

    Args:
        sources: what is read meanwhile; it may not lie in the place that is written.

    Raises:
        ValueError: when `path` is taken or being written, holds a source, or the disk has less room than needed.
        OSError: when the disk gets full meanwhile, or the place cannot be written.
    """
    path = path.expanduser().resolve()
    _check_place(path, overwrite, sources)
    _check_room(path, needed_bytes)
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.partial"
    try:
        with _only_writer(path):
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
    for source in sources:
        if source is None:
            continue
        place = Path(source).expanduser().resolve()
        if place.exists() and (place == path or path in place.parents):
            raise ValueError(f"{path} holds {source}, which is read; choose another folder to write")
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


@contextlib.contextmanager
def _only_writer(path: Path) -> Iterator[None]:
    """Within the context no other process writes this folder; the lock goes with its process, however that ends."""
    lock = path.parent / f".{path.name}.lock"
    with lock.open("w") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another process is writing {path}; wait for it, or choose another folder") from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


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
