"""The batches of a stream by number, for a trainer that asks for them by number and processes that take them in turn.

    stream -> buffers of samples -> lengths -> plan of each buffer -> batches, numbered through

A buffer is so many samples of the stream, good or bad, or what an epoch has left. So batch `i` follows from stream,
config and `i` alone. It is found by reading on to it from the place at hand, from `start`, or from the beginning; what
lies between is measured, by the headers of its images, but not decoded. Each process holds one buffer of undecoded
samples.

A position is that of the stream where a buffer begins, with the buffer's number and that of its first batch:

    {"epoch": 0, "shard": 3, "sample": 17, "stream": "9f3c...", "buffer": 12, "batch": 190}
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import Dataset, get_worker_info

from tokenpacker.data.batches import BatchMaker
from tokenpacker.data.plan import Batch, BatchShape, plan_epoch
from tokenpacker.data.rejects import Rejects
from tokenpacker.data.rows import Record, RecordError
from tokenpacker.data.samples import Length, SampleMaker
from tokenpacker.data.streams import Position, Stream
from tokenpacker.train.config import TrainingConfig

POSITION = "position"  # key of a batch: where a reader may begin to find this batch and all later ones
BUFFER = 1024  # samples; with tar shards of 100 KB images 100 MB per process. More fill rows better and mix better


class StreamBatches(Dataset[dict[str, Any]]):
    """Batches of a stream, one epoch behind the other, without an end of their own.

    Any process may have a copy, made before or after reading: none shares an open file with another.

    Args:
        num_batches: of the run, each of one device.
        start: position that a batch carried under `POSITION`; batches before its buffer cannot be had. None is the
            beginning.
        buffer_size: samples that are planned together. Another one makes other batches.

    Raises:
        ValueError: for a start of another stream or another form, and for an unknown scale factor.
    """

    def __init__(
        self,
        stream: Stream,
        maker: BatchMaker,
        config: TrainingConfig,
        num_batches: int,
        start: Position | None = None,
        *,
        buffer_size: int = BUFFER,
    ) -> None:
        if min(num_batches, buffer_size) < 1:
            raise ValueError(f"num_batches={num_batches} and buffer_size={buffer_size} must be at least 1")
        self.stream, self.maker, self.num_batches = stream, maker, num_batches
        self.start = _checked(stream, start)
        self.batches_per_step = config.batch_size // config.device_batch_size
        self._planner = _Planner(config, self.batches_per_step)
        self._intake = _Intake(maker.maker, config, maker.rejects)
        self._buffer_size = buffer_size
        self._reader: _Reader | None = None
        self._buffer: _Buffer | None = None
        self._process = os.getpid()

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The batch, as `BatchMaker.make` makes it, and under `POSITION` the position of its buffer.

        Raises:
            IndexError: for an index outside the run.
            ValueError: for a batch before `start`, and for data of which no sample can be used.
            TooManyRejects: when too much of the data is bad.
        """
        if not 0 <= index < self.num_batches:
            raise IndexError(f"batch {index} of {self.num_batches} does not exist")
        buffer = self._buffer_with(index)
        rows = [
            [partial(_same, buffer.records[number]) for number in row] for row in buffer.batches[index - buffer.first]
        ]
        return self.maker.make(rows, index // self.batches_per_step) | {POSITION: dict(buffer.start)}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None, "_buffer": None}

    def _buffer_with(self, index: int) -> _Buffer:
        if index < self.start["batch"]:
            raise ValueError(
                f"batch {index} lies before start={self.start!r}; ask for batch {self.start['batch']} or a later one,"
                " or start from an earlier position"
            )
        if self._process != os.getpid():  # forked: the open shard is the other process's
            self._process, self._reader, self._buffer = os.getpid(), None, None
        if self._buffer is not None and index < self._buffer.first:
            self._reader = self._buffer = None
        if self._reader is None:
            self._reader = _Reader(self.stream, self.start, self._intake, self._planner, self._buffer_size)
        while self._buffer is None or index >= self._buffer.end:
            self._buffer = None  # never two at once
            self._buffer = self._read(self._reader)
        return self._buffer

    def _read(self, reader: _Reader) -> _Buffer:
        try:
            return reader.read()
        except BaseException:
            self._reader = None  # it stands in the middle of a buffer
            raise


@dataclass(frozen=True)
class _Buffer:
    """Usable samples that lie one behind the other in the stream, and the batches that they make."""

    start: Position
    records: list[Record]
    batches: list[Batch]

    @property
    def first(self) -> int:
        return self.start["batch"]

    @property
    def end(self) -> int:
        return self.first + len(self.batches)


class _Reader:
    """Reads buffer after buffer; what each holds follows from the place where it begins alone."""

    def __init__(self, stream: Stream, start: Position, intake: _Intake, planner: _Planner, size: int) -> None:
        self._stream, self._intake, self._planner, self._size = stream, intake, planner, size
        self._here = dict(start)  # behind the last sample read, with the next buffer's number and first batch
        self._samples = stream.stream(self._here)
        self._sees_whole_epoch = (self._here["shard"], self._here["sample"]) == (0, 0)
        self._num_usable = 0  # in this epoch

    def read(self) -> _Buffer:
        """The next buffer that has a batch. Raises ValueError for an epoch without one."""
        while True:
            start = self._here
            num_read, records, lengths = self._fill()
            batches = self._planner.plan(lengths, number=start["buffer"])
            self._here = self._here | {
                "buffer": start["buffer"] + (num_read > 0),
                "batch": start["batch"] + len(batches),
            }
            if num_read < self._size:
                self._begin_next_epoch()
            if batches:
                return _Buffer(start, records, batches)

    def _fill(self) -> tuple[int, list[Record], list[Length]]:
        """How many samples were read, and the usable ones with their lengths."""
        num_read, records, lengths = 0, [], []
        for position, record in islice(self._samples, self._size):
            num_read += 1
            self._here = self._here | position
            length = self._intake.length(record, partial(self._stream.where, position))
            if length is not None and not isinstance(record, RecordError):
                records.append(record)
                lengths.append(length)
        self._num_usable += len(records)
        return num_read, records, lengths

    def _begin_next_epoch(self) -> None:
        if self._sees_whole_epoch:
            self._intake.judge()
            if not self._num_usable:
                raise ValueError("no sample of the data can be used; see `tokenpacker data check`")
        self._here = self._here | self._stream.start(self._here["epoch"] + 1)
        self._samples = self._stream.stream(self._here)
        self._sees_whole_epoch, self._num_usable = True, 0


class _Planner:
    """Makes the batches of a buffer, as a run on data files makes those of an epoch."""

    def __init__(self, config: TrainingConfig, batches_per_step: int) -> None:
        self._seed, self._data = config.seed, config.data
        self._shape = BatchShape(
            rows=config.device_batch_size, max_tiles=config.data.max_tiles_per_batch, alike=batches_per_step
        )

    def plan(self, lengths: list[Length], number: int) -> list[Batch]:
        if not lengths:
            return []
        columns = _Columns(
            np.array([length.tokens for length in lengths]), np.array([length.tiles for length in lengths])
        )
        return plan_epoch(
            columns,
            max_length=self._data.max_length,
            seed=self._seed,
            epoch=number,
            batch=self._shape,
            packed=self._data.packed,
            grouped=self._data.grouped,
        )


@dataclass(frozen=True)
class _Columns:
    tokens: np.ndarray
    tiles: np.ndarray


class _Intake:
    """Measures samples and leaves out those that cannot be used. Each process does; one of all counts and tells them.

    Its counts are apart from those of decoding, which see a share of the samples only.
    """

    def __init__(self, maker: SampleMaker, config: TrainingConfig, rejects: Rejects) -> None:
        self._maker = maker
        self._max_tiles = config.data.max_tiles_per_batch
        self._scale_factor = min(config.scale_factors, default=None)  # the longest that a sample can get
        self._rejects = Rejects(rejects.path, rejects.max_share)
        maker.check_scale_factor(self._scale_factor)

    def length(self, record: Record | RecordError, where: partial[str]) -> Length | None:
        """What a sample costs; None where it cannot be used. Raises TooManyRejects."""
        try:
            length = self._measure(record)
        except RecordError as error:
            if _counts():
                self._tell(error, where)
            return None
        if _counts():
            self._rejects.accept()
        return length

    def judge(self) -> None:
        """Raises TooManyRejects when more than the share was left out; for the end of an epoch read from its start."""
        if _counts():
            self._rejects.finish()

    def _measure(self, record: Record | RecordError) -> Length:
        if isinstance(record, RecordError):
            raise record
        length = self._maker.length(record, self._scale_factor)
        if length.tiles > self._max_tiles:
            raise RecordError(
                record.id,
                f"the sample has {length.tiles} tiles, more than max_tiles_per_batch={self._max_tiles}; raise it, or"
                " lower model.max_tiles",
                "too long",
            )
        return length

    def _tell(self, error: RecordError, where: partial[str]) -> None:
        error.source = error.source or where()
        if error.kind == "damaged shard":  # one line of rejects, and perhaps thousands of samples
            warnings.warn(f"DAMAGED SHARD: {error}", stacklevel=2)
        self._rejects.reject(error)


def _counts() -> bool:
    """Whether this process is the one that counts what all of them read: the first process's first worker."""
    worker = get_worker_info()
    return os.environ.get("RANK", "0") == "0" and (worker is None or worker.id == 0)


def _checked(stream: Stream, start: Position | None) -> Position:
    if start is None:
        return stream.start() | {"buffer": 0, "batch": 0}
    position = stream.check(start)
    if any(type(position.get(key)) is not int or position[key] < 0 for key in ("buffer", "batch")):
        raise ValueError(f"start={start!r} needs whole numbers buffer and batch; use one that a batch carried")
    return dict(position)


def _same(record: Record) -> Record:
    return record
