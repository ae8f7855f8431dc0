"""All batches of a run, by number: item `i` is one device's batch, made from the plan alone.

Epochs stand one behind the other. Each is filled up with batches that teach nothing, so that every step takes as many
batches on any number of processes, and none waits for another.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from tokenpacker.data.collate import collate_packed, collate_padded, packing_problem
from tokenpacker.data.index import Lengths
from tokenpacker.data.plan import Batch, BatchShape, fill, plan_epoch
from tokenpacker.data.records import Record, Records
from tokenpacker.data.rejects import Rejects
from tokenpacker.data.rows import RecordError
from tokenpacker.data.samples import Sample, SampleMaker
from tokenpacker.sequence import IGNORED
from tokenpacker.train.config import TrainingConfig

IDS = "ids"  # key of a batch: which samples it holds


@dataclass(frozen=True)
class RunPlan:
    """The batches of all epochs and how they make steps.

    Args:
        batches: of one device each, in the order of use; an empty one is filled up.
        batches_per_step: that an optimizer step takes, over all devices.
        batches_per_epoch: of each epoch, filled up to whole steps.
        fill: share of places that hold a token, in the first epoch.
    """

    batches: list[Batch]
    batches_per_step: int
    batches_per_epoch: list[int]
    fill: float

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return len(self.batches) // self.batches_per_step

    @property
    def samples_per_step(self) -> float:
        """Samples that an optimizer step takes on average: fewer than asked for where tiles bound batches."""
        return sum(len(row) for batch in self.batches for row in batch) / self.num_steps

    @classmethod
    def make(cls, config: TrainingConfig, lengths: Lengths) -> RunPlan:
        """The plan of a whole run. Raises ValueError when no sample can be used."""
        if not len(lengths.usable):
            raise ValueError("no sample of the data can be used; see `tokenpacker data check`")
        per_step = config.batch_size // config.device_batch_size
        shape = BatchShape(rows=config.device_batch_size, max_tiles=config.data.max_tiles_per_batch, alike=per_step)
        batches: list[Batch] = []
        counts: list[int] = []
        first_fill = 0.0
        wanted = None if config.max_steps is None else config.max_steps * per_step
        while len(counts) < config.epochs if wanted is None else len(batches) < wanted:
            epoch = len(counts)
            planned = plan_epoch(
                lengths,
                max_length=config.data.max_length,
                seed=config.seed,
                epoch=epoch,
                batch=shape,
                packed=config.data.packed,
                grouped=config.data.grouped,
            )
            first_fill = first_fill or fill(planned, lengths)
            share = min(1.0, config.epochs - epoch) if wanted is None else 1.0
            planned = planned[: max(1, round(len(planned) * share))]
            planned += [[] for _ in range(-len(planned) % per_step)]
            batches += planned
            counts.append(len(planned))
        return cls(batches[:wanted], per_step, counts, first_fill)


def planned_lengths(lengths: Lengths, max_tiles: int) -> Lengths:
    """The lengths without samples that have more tiles than a batch may hold."""
    return replace(lengths, tokens=np.where(lengths.tiles > max_tiles, 0, lengths.tokens))


class BatchMaker:
    """Makes one device's batch of rows of records: their images are read and cut here.

    What cannot be used is left out of its batch, counted and written down.
    """

    def __init__(self, maker: SampleMaker, config: TrainingConfig, rejects: Rejects) -> None:
        self.maker, self.config, self.rejects = maker, config, rejects
        tokenizer = maker.processor.tokenizer
        self.pad_token_id = tokenizer.pad_token_id
        self.idle = _idle_sample(tokenizer.bos_token_id or tokenizer.pad_token_id, maker)

    def make(self, rows: Iterable[Iterable[Callable[[], Record]]], step: int) -> dict[str, Any]:
        """The batch, and under `IDS` which samples it holds.

        Args:
            rows: each record behind a call that reads it or raises RecordError.
            step: optimizer step that the batch belongs to; all its batches have the same scale factor.
        """
        scale_factor = self._scale_factor(step)
        found = [self._row(row, scale_factor) for row in rows]
        found = [row for row in found if row] or [[self.idle]]
        if self.config.data.packed:
            batch = collate_packed(found, self.pad_token_id)
        else:
            batch = collate_padded([sample for row in found for sample in row], self.pad_token_id)
        if scale_factor is not None:
            batch["scale_factor"] = scale_factor
        return batch | {IDS: [sample.id for row in found for sample in row]}

    def _row(self, row: Iterable[Callable[[], Record]], scale_factor: int | None) -> list[Sample]:
        samples = []
        for read in row:
            source = ""
            try:
                record = read()
                source = record.source
                sample = self.maker.make(record, scale_factor)
                problem = packing_problem(sample) if self.config.data.packed else None
                if problem is not None:
                    raise RecordError(sample.id, problem, "malformed conversation")
            except RecordError as error:
                error.source = error.source or source
                self.rejects.reject(error)
                continue
            self.rejects.accept()
            samples.append(sample)
        return samples

    def _scale_factor(self, step: int) -> int | None:
        if not self.config.scale_factors:
            return None
        return random.Random(f"scale/{self.config.seed}/{step}").choice(self.config.scale_factors)


class RunBatches(Dataset[dict[str, Any]]):
    """The batches of a plan, made when they are asked for."""

    def __init__(self, plan: RunPlan, records: Records, maker: BatchMaker) -> None:
        self.plan, self.records, self.maker = plan, records, maker

    def __len__(self) -> int:
        return len(self.plan.batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rows = [[partial(self.records.__getitem__, number) for number in row] for row in self.plan.batches[index]]
        return self.maker.make(rows, index // self.plan.batches_per_step)


def only_item(items: list[dict[str, Any]]) -> dict[str, Any]:
    """An item is a whole batch already."""
    (item,) = items
    return item


def _idle_sample(token_id: int, maker: SampleMaker) -> Sample:
    """A sample of one token that teaches nothing."""
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
