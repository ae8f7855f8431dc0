"""Samples to the tensors of one batch: one sample per row, or several per row that do not see each other.

A tile that occurs several times in a batch is kept once; `tile_index` lists the tiles in the order of use.

Shapes: B rows, S sequence length, N tiles in order of use, U distinct tiles, (h, w) tile size, R regions in the order
of their marks, P tiles of the image that has most, L patches of a tile.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenpacker.data.samples import Sample
from tokenpacker.sequence import IGNORED

DIGEST_BYTES = 16  # 128 bits: two different tiles of a batch never have the same digest


def collate_padded(samples: Sequence[Sample], pad_token_id: int) -> dict[str, Any]:
    """One sample per row, padded on the right: `input_ids`, `labels`, `attention_mask` (B, S), and the tiles.

    The tiles are `pixel_values` (U, 3, h, w), U 0 without images, and `tile_index` (N,). A model with regions also gets
    `region_cells` (R, P, L) and `region_first_tile` (R,), which counts in `tile_index`. It gets them even if R is 0, so
    that the region encoder takes part in every step on every process.

    Raises:
        ValueError: without samples.
    """
    return _rows([[sample] for sample in samples], pad_token_id)


def collate_packed(rows: Sequence[Sequence[Sample]], pad_token_id: int) -> dict[str, Any]:
    """Several samples per row, one after the other, padded on the right to the longest row.

    Returns what `collate_padded` does, and what keeps the samples of a row apart: `position_ids` (B, S), which restart
    in each sample and in the padding, and the bounds of these segments over all rows laid end to end, under the names
    by which transformers passes them to flash attention: `cu_seq_lens_q` and `_k` (segments + 1,), `max_length_q` and
    `_k`. A model that is given bounds treats its rows as packed.

    Raises:
        ValueError: without samples, and for a sample with a `packing_problem`.
    """
    for sample in (sample for row in rows for sample in row):
        problem = packing_problem(sample)
        if problem is not None:
            raise ValueError(f"sample {sample.id} cannot be packed: {problem}")
    batch = _rows(rows, pad_token_id)
    shape = batch["input_ids"].shape
    segments: list[int] = []
    for row in rows:
        lengths = [len(sample.input_ids) for sample in row]
        padding = shape[1] - sum(lengths)
        segments += [*lengths, padding] if padding else lengths
    bounds = torch.tensor([0, *segments]).cumsum(0).to(torch.int32)  # the kernels need 32 bits
    return batch | {
        "position_ids": torch.cat([torch.arange(length) for length in segments]).view(shape),  # (B, S)
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(segments),
        "max_length_k": max(segments),
    }


def packing_problem(sample: Sample) -> str | None:
    """Why a sample cannot share a row; None if it can.

    Its first token must not be learned, because the last token of the sample before would predict it. None of its
    tokens may be masked, because flash attention cannot mask within a segment.
    """
    if int(sample.labels[0]) != IGNORED:
        return f"labels[0]={int(sample.labels[0])} would be predicted by the sample before; set it to {IGNORED}"
    if not bool(sample.attention_mask.all()):
        place = int((sample.attention_mask == 0).int().argmax())
        return (
            f"attention_mask is 0 at token {place} (a literal padding token); take it out of the text, or do not pack"
        )
    return None


def _rows(rows: Sequence[Sequence[Sample]], pad_token_id: int) -> dict[str, Any]:
    samples = [sample for row in rows for sample in row]
    if not samples:
        raise ValueError("a batch needs at least one sample; it got none")
    shape = len(rows), max(sum(len(sample.input_ids) for sample in row) for row in rows)
    batch = {
        "input_ids": torch.full(shape, pad_token_id),
        "labels": torch.full(shape, IGNORED),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
    }
    for number, row in enumerate(rows):
        start = 0
        for sample in row:
            end = start + len(sample.input_ids)
            for key, tensor in batch.items():
                tensor[number, start:end] = getattr(sample, key)
            start = end
    return batch | _tiles(samples) | _scale_factors(samples) | _regions(samples)


def _tiles(samples: Sequence[Sample]) -> dict[str, Any]:
    """The tiles of all samples in order, each distinct one once."""
    pixels = torch.cat([sample.pixel_values for sample in samples])  # (N, 3, h, w)
    first: dict[bytes, int] = {}
    kept: list[int] = []
    index: list[int] = []
    for number, tile in enumerate(pixels):
        place = first.setdefault(_digest(tile), len(first))
        if place == len(kept):
            kept.append(number)
        index.append(place)
    if len(kept) < len(pixels):
        pixels = pixels[kept]  # (U, 3, h, w)
    return {"pixel_values": pixels, "tile_index": torch.tensor(index, dtype=torch.int64)}


def _digest(tile: Tensor) -> bytes:
    data = tile.contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(data.data, digest_size=DIGEST_BYTES).digest()


def _scale_factors(samples: Sequence[Sample]) -> dict[str, Any]:
    """`scale_factors` (N,) of tiles that drew their own; empty if all have that of the step."""
    found = [sample.scale_factors for sample in samples if sample.scale_factors is not None]
    return {"scale_factors": torch.cat(found)} if found else {}


def _regions(samples: Sequence[Sample]) -> dict[str, Any]:
    """The regions of all samples in order, with first tiles counted through the batch; empty for a model without."""
    found: list[tuple[Tensor, Tensor]] = []
    num_tiles = 0
    for sample in samples:
        if sample.region_cells is not None and sample.region_first_tile is not None:
            found.append((sample.region_cells, sample.region_first_tile + num_tiles))
        num_tiles += len(sample.pixel_values)
    if not found:
        return {}
    most = max(cells.shape[1] for cells, _ in found)
    cells = torch.cat([F.pad(cells, (0, 0, 0, most - cells.shape[1])) for cells, _ in found])  # (R, P, L)
    return {"region_cells": cells, "region_first_tile": torch.cat([first for _, first in found])}
