"""The batches of a run by number. Item `i` is one device's batch, and depends on the data, the settings and `i` alone.

    FileBatches     of records that can be read by number: all epochs are planned before the run
    StreamBatches   of records that come in order: a buffer of them is planned at a time

Steps therefore have the same samples on any number of processes, and a run resumes with its next batch.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from tokenpacker.data.collate import collate_packed, collate_padded, packing_problem
from tokenpacker.data.index import measure
from tokenpacker.data.plan import NOTHING_USABLE, Batch, Planner, Row, RunPlan
from tokenpacker.data.records import Records
from tokenpacker.data.rejects import Rejects
from tokenpacker.data.rows import Record, RecordError
from tokenpacker.data.samples import Length, Mixed, Sample, SampleMaker
from tokenpacker.data.streams import Position, Stream
from tokenpacker.sequence import IGNORED

IDS = "ids"  # key of a batch: ids of its samples
POSITION = "position"  # key of a stream's batch: where a reader may start to find this batch and all later ones
BUFFER_KEYS = ("buffer", "batch")  # of a position, besides those of the stream
BUFFER = 1024  # samples: with tar shards of 100 KB images 100 MB per process. More fill rows better and mix better


class BatchMaker:
    """Makes one device's batch of the rows of a plan: reads the images and cuts them into tiles.

    Records that cannot be used are left out of their batch, counted and written down.

    Args:
        packed: several samples share a row.
        scale_factors: one is drawn for each optimizer step; empty takes the projector's own.
        mixed_share: share of the steps in which each tile draws its own.
        seed: of the draws.
    """

    def __init__(
        self,
        maker: SampleMaker,
        rejects: Rejects,
        *,
        packed: bool,
        scale_factors: Sequence[int] = (),
        mixed_share: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.maker, self.rejects, self.packed = maker, rejects, packed
        self.scale_factors, self.mixed_share, self.seed = scale_factors, mixed_share, seed
        tokenizer = maker.processor.tokenizer
        self.pad_token_id = tokenizer.pad_token_id
        self.idle = _idle_sample(tokenizer.bos_token_id or tokenizer.pad_token_id, maker)

    @property
    def longest_scale_factor(self) -> int | None:
        """The scale factor with the most tokens, which planning counts on; None is the projector's own."""
        return min(self.scale_factors, default=None)

    def make(self, batch: Batch, read: Callable[[int], Record], step: int) -> dict[str, Any]:
        """The batch as tensors, and under `IDS` the ids of its samples.

        Args:
            read: gives the record of a number in `batch`, or raises RecordError.
            step: optimizer step of the batch. All batches of a step have the same scale factor, or all mix them.
        """
        scale_factor: int | Mixed | None = None
        name = f"scale/{self.seed}/{step}"
        if self.scale_factors:
            rng = random.Random(name)
            scale_factor = rng.choice(self.scale_factors)
            if rng.random() < self.mixed_share:
                scale_factor = Mixed(tuple(self.scale_factors), name)
        rows = [self._samples(row, read, scale_factor) for row in batch]
        rows = [row for row in rows if row] or [[self.idle]]
        samples = [sample for row in rows for sample in row]
        pad = self.pad_token_id
        made = collate_packed(rows, pad) if self.packed else collate_padded(samples, pad)
        if isinstance(scale_factor, int):
            made["scale_factor"] = scale_factor
        return made | {IDS: [sample.id for sample in samples]}

    def _samples(self, row: Row, read: Callable[[int], Record], scale_factor: int | Mixed | None) -> list[Sample]:
        samples = []
        for number in row:
            try:
                record = read(number)
                sample = self.maker.make(record, scale_factor)
                problem = packing_problem(sample) if self.packed else None
                if problem is not None:
                    raise RecordError(record.id, problem, "malformed conversation", record.source)
            except RecordError as error:
                self.rejects.reject(error)
                continue
            self.rejects.accept()
            samples.append(sample)
        return samples


class FileBatches(Dataset[dict[str, Any]]):
    """The batches of a plan, each made when it is read."""

    def __init__(self, plan: RunPlan, records: Records, maker: BatchMaker) -> None:
        self.plan, self.records, self.maker = plan, records, maker

    def __len__(self) -> int:
        return len(self.plan.batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The batch, see `BatchMaker.make`."""
        batch = self.plan.batches[index]
        return self.maker.make(batch, self.records.__getitem__, index // self.plan.batches_per_step)


class _Buffer(NamedTuple):
    """Usable samples that follow each other in the stream, and their batches."""

    start: Position
    records: list[Record]
    batches: list[Batch]


class StreamBatches(Dataset[dict[str, Any]]):
    """Batches of a stream. Its epochs follow each other without end.

        stream -> buffers of samples -> lengths -> plan of each buffer -> batches, numbered through

    A buffer has a fixed number of samples, good or bad, or the rest of an epoch. Reading a batch reads on from the
    buffer at hand, or from `start`; the samples in between are measured by the headers of their images, not decoded.
    Each process holds one buffer of undecoded samples. Any process may have a copy: none shares an open file.

    Tried instead: an IterableDataset with the data loaders of accelerate 1.15. Every process makes all batches and
    drops those of the others, and `skip_first_batches` makes all batches of the past again to resume.

    A position is that of the stream where a buffer begins, with the numbers of the buffer and of its first batch:

        {"epoch": 0, "shard": 3, "sample": 17, "stream": "9f3c...", "buffer": 12, "batch": 190}

    Args:
        num_batches: of the run, each of one device.
        start: position that a batch has under `POSITION`; batches before its buffer cannot be read. None is the
            beginning.
        buffer_size: samples that are planned together. Another size makes other batches.

    Raises:
        ValueError: if `start` belongs to another stream or is no position, or the projector lacks a scale factor.
    """

    def __init__(
        self,
        stream: Stream,
        maker: BatchMaker,
        planner: Planner,
        num_batches: int,
        start: Position | None = None,
        *,
        buffer_size: int = BUFFER,
    ) -> None:
        if min(num_batches, buffer_size) < 1:
            raise ValueError(f"num_batches={num_batches} and buffer_size={buffer_size} must be at least 1")
        self.stream, self.maker, self.planner, self.num_batches = stream, maker, planner, num_batches
        self.start = (
            stream.start() | dict.fromkeys(BUFFER_KEYS, 0) if start is None else stream.check(start, *BUFFER_KEYS)
        )
        maker.maker.check_scale_factor(maker.longest_scale_factor)
        # Every process measures all samples, and one of them counts; decoding counts the share that a process decodes.
        self._measured = Rejects(maker.rejects.path, maker.rejects.max_share)
        self._buffer_size = buffer_size
        self._buffers: Iterator[_Buffer] | None = None
        self._buffer: _Buffer | None = None
        self._process = os.getpid()

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The batch, see `BatchMaker.make`, and under `POSITION` the position of its buffer.

        Raises:
            IndexError: if the run has no such batch.
            ValueError: for a batch before `start`, and if no sample of the data can be used.
            TooManyRejects: if too much of the data is bad.
        """
        if not 0 <= index < self.num_batches:
            raise IndexError(f"batch {index} of {self.num_batches} does not exist")
        buffer = self._buffer_with(index)
        batch = buffer.batches[index - buffer.start["batch"]]
        made = self.maker.make(batch, buffer.records.__getitem__, index // self.planner.batches_per_step)
        return made | {POSITION: dict(buffer.start)}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_buffers": None, "_buffer": None}

    def _buffer_with(self, index: int) -> _Buffer:
        if index < self.start["batch"]:
            raise ValueError(
                f"batch {index} lies before start={self.start!r}; ask for batch {self.start['batch']} or a later one,"
                " or start from an earlier position"
            )
        forked = self._process != os.getpid()  # the open shard belongs to the other process
        if forked or (self._buffer is not None and index < self._buffer.start["batch"]):
            self._process, self._buffers, self._buffer = os.getpid(), None, None
        if self._buffers is None:
            self._buffers = self._read_buffers()
        while self._buffer is None or index >= self._buffer.start["batch"] + len(self._buffer.batches):
            self._buffer = None  # never holds two
            try:
                self._buffer = next(self._buffers)
            except BaseException:
                self._buffers = None  # stopped in the middle of a buffer
                raise
        return self._buffer

    def _read_buffers(self) -> Iterator[_Buffer]:
        """The buffers from `start` on that have a batch. What each holds depends on its position alone."""
        here = dict(self.start)  # after the last sample read, with the numbers of the next buffer and its first batch
        while True:
            is_whole = (here["shard"], here["sample"]) == (0, 0)
            samples, epoch_ends, is_usable = self.stream.stream(here), False, False
            while not epoch_ends:
                start, num_read = here, 0
                records: list[Record] = []
                lengths: list[Length] = []
                for position, record in islice(samples, self._buffer_size):
                    num_read += 1
                    here = here | position
                    length = self._measure(record)
                    if length is not None and isinstance(record, Record):
                        records.append(record)
                        lengths.append(length)
                batches = self._plan(lengths, start["buffer"])
                here = here | {"buffer": start["buffer"] + (num_read > 0), "batch": start["batch"] + len(batches)}
                is_usable = is_usable or bool(records)
                epoch_ends = num_read < self._buffer_size
                if epoch_ends:
                    here = here | self.stream.start(here["epoch"] + 1)
                    if is_whole:
                        self._judge_epoch(is_usable)
                if batches:
                    yield _Buffer(start, records, batches)
                    del records  # which the reader holds as long as it needs them

    def _plan(self, lengths: list[Length], number: int) -> list[Batch]:
        tokens, tiles = (np.array([getattr(length, name) for length in lengths]) for name in ("tokens", "tiles"))
        return self.planner.plan(tokens, tiles, number) if lengths else []

    def _measure(self, record: Record | RecordError) -> Length | None:
        """The length of a sample; None if it cannot be used. Raises TooManyRejects."""
        try:
            length = measure(record, self.maker.maker, self.maker.longest_scale_factor)
        except RecordError as error:
            if _counts():
                if error.kind == "damaged shard":  # one reject, and perhaps thousands of samples
                    warnings.warn(f"DAMAGED SHARD: {error}", stacklevel=2)
                self._measured.reject(error)
            return None
        if _counts():
            self._measured.accept()
        return length

    def _judge_epoch(self, is_usable: bool) -> None:
        if _counts():
            self._measured.finish()
        if not is_usable:
            raise ValueError(NOTHING_USABLE)


def only_item(items: list[dict[str, Any]]) -> dict[str, Any]:
    """The one item of a list: the collate function for data sets whose items are whole batches."""
    (item,) = items
    return item


def _idle_sample(token_id: int, maker: SampleMaker) -> Sample:
    """A sample of one token from which nothing is learned."""
    height, width = maker.processor.image_processor.tile_size
    return Sample(
        id="",
        input_ids=torch.tensor([token_id]),
        labels=torch.tensor([IGNORED]),
        attention_mask=torch.ones(1, dtype=torch.int64),
        pixel_values=torch.empty(0, 3, height, width),
        tile_grids=(),
        **({} if maker.processor.region_token_id is None else maker.processor.region_inputs([], [], [])),
    )


def _counts() -> bool:
    """Whether this process counts what all of them read: the first worker of the first process."""
    worker = get_worker_info()
    return os.environ.get("RANK", "0") == "0" and (worker is None or worker.id == 0)
