"""The lengths of all samples of a data set, for grouping and packing: read once from headers, by worker processes.

Records are measured in chunks. With a cache folder each finished chunk is a file there, so an interrupted index
continues where it stopped, and a damaged chunk is made again. The folder's name is a fingerprint of the data files
(path, size, time of change), the folder of images, the settings of the sample maker and the scale factor. It does not
cover the image files: delete the cache after changing them.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from tokenpacker.data.records import Records
from tokenpacker.data.rejects import Rejects
from tokenpacker.data.rows import Record, RecordError
from tokenpacker.data.samples import Length, SampleMaker
from tokenpacker.progress import Progress

CHUNK = 1024  # records: about a second of work that an interruption may cost, per worker
FORMAT = 2  # of the cached files; a new number makes old caches void
Chunk = tuple[np.ndarray, dict[int, RecordError]]  # (5, records) lengths, and errors by their place in the chunk


@dataclass(frozen=True)
class Lengths:
    """The fields of `Length`, each as int32 (records,), 0 for records that cannot be used.

    Args:
        errors: why they cannot, by number.
    """

    tokens: np.ndarray
    image_tokens: np.ndarray
    tiles: np.ndarray
    images: np.ndarray
    regions: np.ndarray
    errors: dict[int, RecordError]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def usable(self) -> np.ndarray:
        """Numbers of the records that make a sample. Every sample has tokens."""
        return np.flatnonzero(self.tokens)


def index_lengths(
    records: Records,
    maker: SampleMaker,
    *,
    scale_factor: int | None = None,
    rejects: Rejects | None = None,
    cache: str | Path | None = None,
    numbers: Sequence[int] | None = None,
    decode: bool = False,
    num_workers: int | None = None,
    progress: bool = False,
) -> Lengths:
    """The lengths of all records, or of `numbers`, in that order.

    Args:
        rejects: counts and writes down what cannot be used, cached or not.
        cache: folder of caches; None keeps nothing.
        numbers: of the records to measure; None is all.
        decode: also make each sample, which finds damaged images. Much slower.
        num_workers: processes; 0 works in this one, None takes one per core if there are more than a few chunks.
        progress: show progress on standard error.

    Raises:
        TooManyRejects: as soon as `rejects` has seen too many.
        ValueError: if the projector lacks the scale factor, or a worker is killed.
    """
    maker.check_scale_factor(scale_factor)
    chosen = np.arange(len(records)) if numbers is None else np.asarray(numbers, dtype=np.int64)
    folder = None
    if cache is not None:
        folder = Path(cache) / _fingerprint(records, maker, scale_factor, decode, chosen)
        folder.mkdir(parents=True, exist_ok=True)
    chunks = _Chunks(records, maker, scale_factor, decode, chosen, CHUNK, folder)
    if num_workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_workers = min(cores, len(chunks)) if len(chunks) > 4 else 0
    loader = DataLoader(
        chunks,
        collate_fn=itemgetter(0),
        num_workers=num_workers,
        multiprocessing_context="spawn" if num_workers else None,  # a fork could hang in the threads of torch
        in_order=False,
        generator=torch.Generator(),  # leaves the global one alone
    )
    table = np.zeros((len(Length._fields), len(chosen)), dtype=np.int32)
    errors: dict[int, RecordError] = {}
    try:
        with Progress("reading data", len(chosen), shown=progress) as reading:
            for first, (values, failed) in loader:
                size = values.shape[1]
                table[:, first : first + size] = values
                errors |= {first + place: error for place, error in failed.items()}
                if rejects is not None:
                    rejects.accept(size - len(failed))
                    for error in failed.values():
                        rejects.reject(error)
                reading.update(reading.done + size)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ValueError(
            f"a process that indexed {records.files[0]} was killed, perhaps because memory ran out; run again with"
            " fewer workers, finished chunks in a cache folder are kept"
        ) from None
    return Lengths(**dict(zip(Length._fields, table, strict=True)), errors=dict(sorted(errors.items())))


@dataclass(frozen=True)
class _Chunks(Dataset[tuple[int, Chunk]]):
    """The lengths of each chunk of the chosen records, with the place of its first record among them."""

    records: Records
    maker: SampleMaker
    scale_factor: int | None
    decode: bool
    chosen: np.ndarray
    size: int
    folder: Path | None

    def __len__(self) -> int:
        return -(-len(self.chosen) // self.size)

    def __getitem__(self, number: int) -> tuple[int, Chunk]:
        first = number * self.size
        numbers = self.chosen[first : first + self.size].tolist()
        if self.folder is None:
            return first, self._measure(numbers)
        path = self.folder / f"chunk-{number:06d}.npz"
        chunk = _read_chunk(path, len(numbers))
        if chunk is None:
            chunk = self._measure(numbers)
            _write_chunk(path, *chunk)
        return first, chunk

    def _measure(self, numbers: list[int]) -> Chunk:
        values, errors = np.zeros((len(Length._fields), len(numbers)), dtype=np.int32), {}
        for place, number in enumerate(numbers):
            try:
                values[:, place] = measure(self.records[number], self.maker, self.scale_factor, self.decode)
            except RecordError as error:  # noqa: PERF203 - of one record
                errors[place] = error
        return values, errors


def measure(
    record: Record | RecordError, maker: SampleMaker, scale_factor: int | None = None, decode: bool = False
) -> Length:
    """The length of a record's sample; `decode` also makes it. Raises RecordError, the one given or one found."""
    if isinstance(record, RecordError):
        raise record
    length = maker.length(record, scale_factor)
    if decode:
        maker.make(record, scale_factor)
    return length


def _fingerprint(
    records: Records, maker: SampleMaker, scale_factor: int | None, decode: bool, chosen: np.ndarray
) -> str:
    files = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in records.files]
    numbers = hashlib.sha256(chosen.astype(np.int64).tobytes()).hexdigest()
    settings = [FORMAT, CHUNK, files, str(records.images_root), maker.fingerprint, scale_factor, decode, numbers]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]


def _write_chunk(path: Path, values: np.ndarray, errors: dict[int, RecordError]) -> None:
    """Writes the file whole or not at all: a reader never sees half of it."""
    rows = [[place, error.id, error.reason, error.kind, error.source] for place, error in errors.items()]
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        np.savez(file, values=values, errors=np.frombuffer(json.dumps(rows).encode(), dtype=np.uint8))
    os.replace(partial, path)


def _read_chunk(path: Path, num_records: int) -> Chunk | None:
    """A finished chunk; None if there is none or it is damaged, which the checksums of the file tell."""
    try:
        with np.load(path, allow_pickle=False) as content:
            values, rows = content["values"], json.loads(content["errors"].tobytes())
        if values.shape != (len(Length._fields), num_records) or values.dtype != np.int32:
            return None
        return values, {int(place): RecordError(*fields) for place, *fields in rows}
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None
