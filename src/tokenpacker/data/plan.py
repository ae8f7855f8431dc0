"""Which samples share a row and a batch in an epoch: a pure function of the samples' lengths, a seed and the epoch.

    lengths -> shuffle -> group by kind and length -> batches        (padded)
    lengths -> shuffle -> fill rows -> even out tiles -> batches     (packed)

A plan is a list of batches, a batch a list of rows, a row a list of sample numbers. Every sample is in it exactly once,
and no number of processes enters: these take the batches in turn.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Row = list[int]
Batch = list[Row]

# How far shuffling and order may be traded for fit. More samples in a buffer fill rows better and mix worse; the rows
# that a buffer leaves half empty are at most a few, of thousands.
SAMPLES_PER_BUFFER = 8192
BATCHES_PER_WINDOW = 64
ROWS_TRIED = 16  # where tiles fill rows before tokens do, a longer search costs seconds and finds little


class Lengths(Protocol):
    """What each record costs, as columns (records,) of whole numbers; `index.Lengths` is one."""

    @property
    def tokens(self) -> np.ndarray:
        """Tokens, image tokens included; 0 for a record that makes no sample and is left out of every plan."""

    @property
    def tiles(self) -> np.ndarray:
        """Tiles; 0 for text alone."""


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """How large a batch may be.

    Args:
        rows: a padded batch has a sample in each, a packed one as many as fit. A batch may be smaller.
        max_tiles: of all its samples together; None for no bound.
        alike: this many padded batches that follow one another are of one kind and similar length. As many as an
            optimizer step takes, so that processes wait little for one another; packed batches all cost the same.
    """

    rows: int
    max_tiles: int | None = None
    alike: int = 1

    def __post_init__(self) -> None:
        for name in ("rows", "max_tiles", "alike"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")

    def has_room(self, tiles: int) -> bool:
        """Whether a batch may hold so many tiles."""
        return self.max_tiles is None or tiles <= self.max_tiles


def plan_epoch(
    lengths: Lengths, *, max_length: int, seed: int, epoch: int, batch: BatchShape, packed: bool, grouped: bool
) -> list[Batch]:
    """The batches of an epoch in their order.

    Args:
        max_length: tokens that a row holds.
        packed: several samples share a row.
        grouped: puts samples of one kind (with or without images) and similar length into a batch; packed rows, which
            are all full, are put together so that batches have about the same number of tiles.

    Raises:
        ValueError: for a sample with more tokens than a row, or more tiles than a batch, may hold.
    """
    _require_fit(lengths, max_length, batch)
    random = _Random(seed, epoch)
    usable = np.flatnonzero(lengths.tokens)
    order = usable[random.order(len(usable))]
    if packed:
        return _packed_batches(lengths, order, max_length, batch, grouped, random)
    if not grouped:
        return list(_cut(([sample] for sample in order.tolist()), lengths.tiles.tolist(), batch))
    return _grouped_batches(lengths, order, batch, random)


def fill(batches: Iterable[Batch], lengths: Lengths) -> float:
    """The share of places that hold a token, where each batch is as wide as its longest row; 1 means no padding."""
    tokens = lengths.tokens.tolist()
    used = places = 0
    for batch in batches:
        rows = [sum(tokens[sample] for sample in row) for row in batch]
        used += sum(rows)
        places += len(rows) * max(rows)
    return used / places if places else 1.0


class _Random:
    """Orders drawn from numpy's raw bits: those are promised never to change between versions, its shuffles are not."""

    def __init__(self, seed: int, epoch: int) -> None:
        self.bits = np.random.PCG64(np.random.SeedSequence([seed, epoch]))

    def order(self, count: int) -> np.ndarray:
        return np.argsort(self.bits.random_raw(count), kind="stable")

    def shuffled(self, items: Sequence[list]) -> list[list]:
        return [items[index] for index in self.order(len(items)).tolist()]


def _require_fit(lengths: Lengths, max_length: int, batch: BatchShape) -> None:
    limits = (
        ("tokens", lengths.tokens, "max_length", max_length),
        ("tiles", lengths.tiles, "max_tiles", batch.max_tiles),
    )
    for name, column, limit_name, limit in limits:
        if limit is not None and (column > limit).any():
            sample = int((column > limit).argmax())
            raise ValueError(
                f"sample {sample} has {column[sample]} {name}, more than {limit_name}={limit}; raise the limit, or"
                " reject the sample before"
            )


def _cut(rows: Iterable[Row], tiles: Sequence[int], shape: BatchShape) -> Iterator[Batch]:
    """Rows in their order, as many to a batch as it may hold."""
    batch: Batch = []
    num_tiles = 0
    for row in rows:
        row_tiles = sum(tiles[sample] for sample in row)
        if batch and (len(batch) == shape.rows or not shape.has_room(num_tiles + row_tiles)):
            yield batch
            batch, num_tiles = [], 0
        batch.append(row)
        num_tiles += row_tiles
    if batch:
        yield batch


def _grouped_batches(lengths: Lengths, order: np.ndarray, shape: BatchShape, random: _Random) -> list[Batch]:
    """Batches of similar samples. Runs of `alike` stay together; what fills no run comes last, so that runs align."""
    tiles = lengths.tiles.tolist()
    runs: list[list[Batch]] = []
    rest: list[list[Batch]] = []
    for has_images in (True, False):
        kind = order[(lengths.tiles[order] > 0) == has_images]
        batches = list(_cut(([sample] for sample in _sorted_in_windows(lengths, kind, shape)), tiles, shape))
        for start in range(0, len(batches), shape.alike):
            run = batches[start : start + shape.alike]
            (runs if len(run) == shape.alike else rest).append(run)
    return [batch for run in random.shuffled(runs) + random.shuffled(rest) for batch in run]


def _sorted_in_windows(lengths: Lengths, order: np.ndarray, shape: BatchShape) -> Iterator[int]:
    """The samples, longest first within each window of the order."""
    size = max(BATCHES_PER_WINDOW, shape.alike) * shape.rows
    for start in range(0, len(order), size):
        window = order[start : start + size]
        yield from window[np.argsort(-lengths.tokens[window], kind="stable")].tolist()


def _packed_batches(
    lengths: Lengths, order: np.ndarray, max_length: int, shape: BatchShape, grouped: bool, random: _Random
) -> list[Batch]:
    rows: list[Row] = []
    for start in range(0, len(order), SAMPLES_PER_BUFFER):
        rows += _fill_rows(lengths, order[start : start + SAMPLES_PER_BUFFER], max_length, shape)
    rows = random.shuffled(rows)
    tiles = lengths.tiles.tolist()
    if not grouped:
        return list(_cut(rows, tiles, shape))
    batches: list[Batch] = []
    size = BATCHES_PER_WINDOW * shape.rows
    for start in range(0, len(rows), size):
        batches += _even_batches(rows[start : start + size], tiles, shape)
    return random.shuffled(batches)


def _fill_rows(lengths: Lengths, samples: np.ndarray, max_length: int, shape: BatchShape) -> list[Row]:
    """Rows of at most `max_length` tokens: longest sample first, each into the row where the least room is left."""
    samples = samples[np.argsort(-lengths.tokens[samples], kind="stable")]
    tokens, tiles = lengths.tokens[samples].tolist(), lengths.tiles[samples].tolist()
    rows: list[Row] = []
    row_tiles: list[int] = []
    open_rows: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for sample, need, add in zip(samples.tolist(), tokens, tiles, strict=True):
        fits = bisect_left(open_rows, (need, -1))
        tried = range(fits, min(fits + ROWS_TRIED, len(open_rows)))
        place = next((place for place in tried if shape.has_room(row_tiles[open_rows[place][1]] + add)), None)
        if place is None:
            left, row = max_length, len(rows)
            rows.append([])
            row_tiles.append(0)
        else:
            left, row = open_rows.pop(place)
        rows[row].append(sample)
        row_tiles[row] += add
        if left - need >= tokens[-1]:  # the shortest of the buffer may still come
            insort(open_rows, (left - need, row))
    return rows


def _even_batches(rows: Sequence[Row], tiles: Sequence[int], shape: BatchShape) -> list[Batch]:
    """Batches of `shape.rows` rows, each row put where the fewest tiles are, rows with many first."""
    row_tiles = [sum(tiles[sample] for sample in row) for row in rows]
    batches: list[Batch] = [[] for _ in range(-(-len(rows) // shape.rows))]
    emptiest = [(0, index) for index in range(len(batches))]
    for row in sorted(range(len(rows)), key=lambda row: -row_tiles[row]):
        if emptiest and shape.has_room(emptiest[0][0] + row_tiles[row]):
            num_tiles, index = heapq.heappop(emptiest)
        else:
            num_tiles, index = 0, len(batches)
            batches.append([])
        batches[index].append(rows[row])
        if len(batches[index]) < shape.rows:
            heapq.heappush(emptiest, (num_tiles + row_tiles[row], index))
    return [batch for batch in batches if batch]
