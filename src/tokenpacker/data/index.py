"""Lengths of all samples of a data set, for grouping and packing: read from headers, by worker processes, once.

Records are indexed in chunks. With a cache folder each finished chunk is a file there, so an interrupted index goes on
where it stopped, and a damaged chunk is made again. The folder's name is a fingerprint of the data files (path, size,
time of change), the folder of images, the sample maker's settings and the scale factor. The images' own files are not
in it: after changing them, delete the cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from tokenpacker.data.records import Records
from tokenpacker.data.rejects import Rejects
from tokenpacker.data.rows import RecordError
from tokenpacker.data.samples import Length, SampleMaker
from tokenpacker.progress import Progress

CHUNK = 1024  # records: a second or so of work that an interruption may cost, per worker
FORMAT = 2  # of the cached files; a new number makes old caches void
FIELDS = ("tokens", "image_tokens", "tiles", "images", "regions")
_Job = tuple[int, list[int]]  # number of the chunk, numbers of its records


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lengths of records by number, int32, 0 for those that cannot be used; and why they cannot.

    Args:
        tokens: in all.
        image_tokens: of these, with separators.
        tiles: for the encoder.
        images: per sample.
        regions: per sample.
        errors: by number of the record.
    """

    tokens: np.ndarray
    image_tokens: np.ndarray
    tiles: np.ndarray
    images: np.ndarray
    regions: np.ndarray
    errors: dict[int, RecordError]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Length:
        """The length of a usable record."""
        fields = ("tokens", "image_tokens", "tiles", "regions")
        return Length(**{name: int(getattr(self, name)[index]) for name in fields})

    @property
    def usable(self) -> np.ndarray:
        """Numbers of the records that make a sample: none of these is without tokens."""
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
        numbers: of the records to look at; None for all.
        decode: makes each sample whole, so that damaged images are found too. Much slower.
        num_workers: processes; 0 works in this one, None takes one per core for more than a few chunks.
        progress: shows on standard error how far it is.

    Raises:
        TooManyRejects: as soon as `rejects` has seen too many.
        ValueError: for a scale factor that the projector does not have, and when a worker is killed.
    """
    maker.check_scale_factor(scale_factor)
    chosen = np.arange(len(records)) if numbers is None else np.asarray(numbers, dtype=np.int64)
    folder = None
    if cache is not None:
        folder = Path(cache) / _fingerprint(records, maker, scale_factor, decode, chosen)
        folder.mkdir(parents=True, exist_ok=True)
    jobs = [(start // CHUNK, chosen[start : start + CHUNK].tolist()) for start in range(0, len(chosen), CHUNK)]
    if num_workers is None:
        num_workers = min(os.cpu_count() or 1, len(jobs)) if len(jobs) > 4 else 0
    worker = _Worker(records, maker, scale_factor, decode, folder)
    table = np.zeros((len(FIELDS), len(chosen)), dtype=np.int32)
    errors: dict[int, RecordError] = {}
    # Closed at once when this ends early, or worker processes would go on.
    reading = Progress("reading data", len(chosen), shown=progress)
    with reading, closing(_work(worker, jobs, num_workers)) as results:
        for (number, part), (values, failed) in results:
            table[:, number * CHUNK : number * CHUNK + len(part)] = values
            for place, error in failed.items():
                errors[number * CHUNK + place] = error
            _count(rejects, len(part), failed)
            reading.update(reading.done + len(part))
    return Lengths(**dict(zip(FIELDS, table, strict=True)), errors=dict(sorted(errors.items())))


@dataclass(frozen=True)
class _Worker:
    """What each process needs; called with a job it gives (5, records) lengths and the errors by place."""

    records: Records
    maker: SampleMaker
    scale_factor: int | None
    decode: bool
    folder: Path | None

    def __call__(self, job: _Job) -> tuple[np.ndarray, dict[int, RecordError]]:
        number, part = job
        path = None if self.folder is None else self.folder / f"chunk-{number:06d}.npz"
        found = None if path is None else _read_chunk(path, len(part))
        if found is not None:
            return found
        values, errors = np.zeros((len(FIELDS), len(part)), dtype=np.int32), {}
        for place, index in enumerate(part):
            result = self._lengths(index)
            if isinstance(result, RecordError):
                errors[place] = result
            else:
                values[:, place] = result
        if path is not None:
            _write_chunk(path, values, errors)
        return values, errors

    def _lengths(self, index: int) -> tuple[int, int, int, int, int] | RecordError:
        try:
            record = self.records[index]
            length = self.maker.length(record, self.scale_factor)
            if self.decode:
                self.maker.make(record, self.scale_factor)
        except RecordError as error:
            error.source = error.source or self.records.where(index)
            return error
        return length.tokens, length.image_tokens, length.tiles, len(record.images), length.regions


def _work(
    worker: _Worker, jobs: list[_Job], num_workers: int
) -> Generator[tuple[_Job, tuple[np.ndarray, dict[int, RecordError]]], None, None]:
    """Each job with its result, as they get done; at most two jobs per process are under way."""
    if num_workers == 0:
        yield from ((job, worker(job)) for job in jobs)
        return
    # Spawned, for a fork of a process that has computed with torch may hang in its threads.
    pool = ProcessPoolExecutor(num_workers, get_context("spawn"), _start_worker, (worker,))
    waiting: dict[Future[Any], _Job] = {}
    remaining = iter(jobs)
    try:
        while True:
            for job in remaining:
                waiting[pool.submit(_run, job)] = job
                if len(waiting) >= 2 * num_workers:
                    break
            if not waiting:
                return
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                yield waiting.pop(future), future.result()
    except BrokenProcessPool:
        raise ValueError(
            f"a process that indexed {worker.records.files[0]} was killed, perhaps for want of memory; run again with"
            " fewer workers, chunks that a cache folder holds are kept"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: _Worker | None = None  # of a worker process, set once when it starts


def _start_worker(worker: _Worker) -> None:
    import torch

    global _worker
    _worker = worker
    torch.set_num_threads(1)  # the processes are the parallelism


def _run(job: _Job) -> tuple[np.ndarray, dict[int, RecordError]]:
    assert _worker is not None
    return _worker(job)


def _count(rejects: Rejects | None, num_seen: int, failed: dict[int, RecordError]) -> None:
    if rejects is None:
        return
    rejects.accept(num_seen - len(failed))
    for error in failed.values():
        rejects.reject(error)


def _fingerprint(
    records: Records, maker: SampleMaker, scale_factor: int | None, decode: bool, chosen: np.ndarray
) -> str:
    files = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in records.files]
    numbers = hashlib.sha256(chosen.astype(np.int64).tobytes()).hexdigest()
    settings = [FORMAT, CHUNK, files, str(records.images_root), maker.fingerprint, scale_factor, decode, numbers]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]


def _write_chunk(path: Path, values: np.ndarray, errors: dict[int, RecordError]) -> None:
    """Whole or not at all: a reader never sees half a file."""
    rows = [[place, error.id, error.reason, error.kind, error.source] for place, error in errors.items()]
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        np.savez(file, values=values, errors=np.frombuffer(json.dumps(rows).encode(), dtype=np.uint8))
    os.replace(partial, path)


def _read_chunk(path: Path, num_records: int) -> tuple[np.ndarray, dict[int, RecordError]] | None:
    """A finished chunk; None where there is none, or a damaged one. (The file's own checksums find that.)"""
    try:
        with np.load(path, allow_pickle=False) as content:
            values, rows = content["values"], json.loads(content["errors"].tobytes())
        if values.shape != (len(FIELDS), num_records) or values.dtype != np.int32:
            return None
        return values, {int(place): RecordError(*fields) for place, *fields in rows}
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None
