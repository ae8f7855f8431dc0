"""Which samples share a row and a batch: a pure function of their lengths, the seed and the number of the epoch.

    lengths -> shuffle -> group by kind and length -> batches              (padded)
    lengths -> shuffle -> fill rows -> even out tiles -> batches           (packed)

A batch is a list of rows, a row a list of sample numbers. Every sample of an epoch is in its batches exactly once. The
number of processes does not matter: they take the batches in turn.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Row = list[int]
Batch = list[Row]

# Larger buffers and windows fit samples together better and mix them worse. Of the thousands of rows that a buffer
# fills, at most a few stay half empty.
SAMPLES_PER_BUFFER = 8192
BATCHES_PER_WINDOW = 64
ROWS_TRIED = 16  # if tiles fill rows before tokens do, a longer search costs seconds and finds little
NOTHING_USABLE = "no sample of the data can be used; see `tokenpacker data check`"
HELD_OUT = 2**32  # stands in for the number of an epoch when samples are drawn that no epoch has


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Plans the batches of an epoch.

    Args:
        rows: of a batch, which may also have fewer. A padded row holds one sample, a packed row as many as fit.
        max_length: tokens of a row.
        max_tiles: of all samples of a batch; None is no bound.
        batches_per_step: of an optimizer step. So many padded batches in a row have samples of one kind and similar
            length, so that processes wait little for each other; packed batches all cost the same.
        packed: several samples share a row.
        grouped: a batch has samples of one kind (with or without images) and similar length. Packed rows are all full;
            they are combined so that batches have about the same number of tiles.
    """

    rows: int
    max_length: int
    max_tiles: int | None = None
    batches_per_step: int = 1
    packed: bool = False
    grouped: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rows", "max_tiles", "batches_per_step"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")

    def plan(self, tokens: np.ndarray, tiles: np.ndarray, epoch: int) -> list[Batch]:
        """The batches of an epoch in order.

        Args:
            tokens: (samples,), image tokens included; 0 leaves a sample out.
            tiles: (samples,), 0 for text alone.

        Raises:
            ValueError: for a sample with more tokens than a row, or more tiles than a batch, may hold.
        """
        self._require_fit(tokens, tiles)
        random = _Random(self.seed, epoch)
        usable = np.flatnonzero(tokens)
        order = usable[random.order(len(usable))]
        if self.packed:
            return self._packed_batches(tokens, tiles, order, random)
        if self.grouped:
            return self._grouped_batches(tokens, tiles, order, random)
        return list(self._cut(([sample] for sample in order.tolist()), tiles.tolist()))

    def _has_room(self, tiles: int) -> bool:
        return self.max_tiles is None or tiles <= self.max_tiles

    def _require_fit(self, tokens: np.ndarray, tiles: np.ndarray) -> None:
        for name, column, limit_name in (("tokens", tokens, "max_length"), ("tiles", tiles, "max_tiles")):
            limit = getattr(self, limit_name)
            if limit is not None and (column > limit).any():
                sample = int((column > limit).argmax())
                raise ValueError(
                    f"sample {sample} has {column[sample]} {name}, more than {limit_name}={limit}; raise the limit, or"
                    " reject the sample before"
                )

    def _cut(self, rows: Iterable[Row], tiles: Sequence[int]) -> Iterator[Batch]:
        """Batches of rows in their order, each as large as allowed."""
        batch: Batch = []
        num_tiles = 0
        for row in rows:
            row_tiles = sum(tiles[sample] for sample in row)
            if batch and (len(batch) == self.rows or not self._has_room(num_tiles + row_tiles)):
                yield batch
                batch, num_tiles = [], 0
            batch.append(row)
            num_tiles += row_tiles
        if batch:
            yield batch

    def _grouped_batches(
        self, tokens: np.ndarray, tiles: np.ndarray, order: np.ndarray, random: _Random
    ) -> list[Batch]:
        """Batches of similar samples. The batches of a step stay together; incomplete steps come last."""
        steps: list[list[Batch]] = []
        rest: list[list[Batch]] = []
        window = max(BATCHES_PER_WINDOW, self.batches_per_step) * self.rows
        for has_images in (True, False):
            kind = order[(tiles[order] > 0) == has_images]
            windows = (_longest_first(kind[start : start + window], tokens) for start in range(0, len(kind), window))
            rows = ([sample] for samples in windows for sample in samples.tolist())
            batches = list(self._cut(rows, tiles.tolist()))
            for start in range(0, len(batches), self.batches_per_step):
                step = batches[start : start + self.batches_per_step]
                (steps if len(step) == self.batches_per_step else rest).append(step)
        return [batch for step in random.shuffled(steps) + random.shuffled(rest) for batch in step]

    def _packed_batches(self, tokens: np.ndarray, tiles: np.ndarray, order: np.ndarray, random: _Random) -> list[Batch]:
        rows: list[Row] = []
        for start in range(0, len(order), SAMPLES_PER_BUFFER):
            rows += self._fill_rows(tokens, tiles, order[start : start + SAMPLES_PER_BUFFER])
        rows = random.shuffled(rows)
        if not self.grouped:
            return list(self._cut(rows, tiles.tolist()))
        batches: list[Batch] = []
        size = BATCHES_PER_WINDOW * self.rows
        for start in range(0, len(rows), size):
            batches += self._even_batches(rows[start : start + size], tiles.tolist())
        return random.shuffled(batches)

    def _fill_rows(self, all_tokens: np.ndarray, all_tiles: np.ndarray, samples: np.ndarray) -> list[Row]:
        """Rows of at most `max_length` tokens: the longest sample first, each into the row with the least room left."""
        samples = _longest_first(samples, all_tokens)
        tokens, tiles = all_tokens[samples].tolist(), all_tiles[samples].tolist()
        rows: list[Row] = []
        row_tiles: list[int] = []
        open_rows: list[tuple[int, int]] = []  # (tokens left, row), sorted
        for sample, need, add in zip(samples.tolist(), tokens, tiles, strict=True):
            fits = bisect_left(open_rows, (need, -1))
            tried = range(fits, min(fits + ROWS_TRIED, len(open_rows)))
            place = next((place for place in tried if self._has_room(row_tiles[open_rows[place][1]] + add)), None)
            if place is None:
                left, row = self.max_length, len(rows)
                rows.append([])
                row_tiles.append(0)
            else:
                left, row = open_rows.pop(place)
            rows[row].append(sample)
            row_tiles[row] += add
            if left - need >= tokens[-1]:  # room for the shortest sample of the buffer
                insort(open_rows, (left - need, row))
        return rows

    def _even_batches(self, rows: Sequence[Row], tiles: Sequence[int]) -> list[Batch]:
        """Batches with about the same number of tiles: the row with the most first, each into the emptiest batch."""
        row_tiles = [sum(tiles[sample] for sample in row) for row in rows]
        batches: list[Batch] = [[] for _ in range(-(-len(rows) // self.rows))]
        emptiest = [(0, index) for index in range(len(batches))]
        for row in sorted(range(len(rows)), key=lambda row: -row_tiles[row]):
            if emptiest and self._has_room(emptiest[0][0] + row_tiles[row]):
                num_tiles, index = heapq.heappop(emptiest)
            else:
                num_tiles, index = 0, len(batches)
                batches.append([])
            batches[index].append(rows[row])
            if len(batches[index]) < self.rows:
                heapq.heappush(emptiest, (num_tiles + row_tiles[row], index))
        return [batch for batch in batches if batch]


@dataclass(frozen=True)
class RunPlan:
    """The batches of all epochs of a run.

    Args:
        batches: of one device each, in the order of use. An epoch ends with empty ones where it needs them, so that
            every step has as many batches on any number of processes, and none waits for another.
        batches_per_step: that an optimizer step takes, over all devices.
        fill: share of places that hold a token, in the first epoch.
    """

    batches: list[Batch]
    batches_per_step: int
    fill: float

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return len(self.batches) // self.batches_per_step

    @property
    def samples_per_step(self) -> float:
        """Mean samples of an optimizer step. Below the batch size if tiles bound batches."""
        return sum(len(row) for batch in self.batches for row in batch) / self.num_steps


def plan_run(
    planner: Planner, tokens: np.ndarray, tiles: np.ndarray, *, epochs: float = 1.0, max_steps: int | None = None
) -> RunPlan:
    """The plan of a run of `max_steps`, or else of `epochs`. Raises ValueError if no sample can be used."""
    if not tokens.any():
        raise ValueError(NOTHING_USABLE)
    per_step = planner.batches_per_step
    wanted = None if max_steps is None else max_steps * per_step
    batches: list[Batch] = []
    epoch, first_fill = 0, 0.0
    while epoch < epochs if wanted is None else len(batches) < wanted:
        planned = planner.plan(tokens, tiles, epoch)
        first_fill = first_fill or fill(planned, tokens)
        share = min(1.0, epochs - epoch) if wanted is None else 1.0
        planned = planned[: max(1, round(len(planned) * share))]
        batches += planned + [[] for _ in range(-len(planned) % per_step)]
        epoch += 1
    return RunPlan(batches[:wanted], per_step, first_fill)


def draw_held_out(samples: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Numbers of the samples that a run is not trained on, in order: at least one if the share is above 0.

    Raises:
        ValueError: if no sample would be left.
    """
    count = max(1, round(share * len(samples))) if share else 0
    if share and count >= len(samples):
        raise ValueError(
            f"evaluation.held_out_share={share:g} leaves none of {len(samples)} usable samples to train on; lower it"
        )
    return np.sort(samples[_Random(seed, HELD_OUT).order(len(samples))[:count]])


def fill(batches: Iterable[Batch], tokens: np.ndarray) -> float:
    """The share of places that hold a token, if each batch is as wide as its longest row; 1 means no padding."""
    lengths = tokens.tolist()
    used = places = 0
    for batch in batches:
        rows = [sum(lengths[sample] for sample in row) for row in batch]
        used += sum(rows)
        places += len(rows) * max(rows)
    return used / places if places else 1.0


class _Random:
    """Orders from numpy's raw bits, which stay the same in all its versions. Its shuffles may change."""

    def __init__(self, seed: int, epoch: int) -> None:
        self.bits = np.random.PCG64(np.random.SeedSequence([seed, epoch]))

    def order(self, count: int) -> np.ndarray:
        return np.argsort(self.bits.random_raw(count), kind="stable")

    def shuffled(self, items: Sequence[list]) -> list[list]:
        return [items[index] for index in self.order(len(items)).tolist()]


def _longest_first(samples: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return samples[np.argsort(-tokens[samples], kind="stable")]
