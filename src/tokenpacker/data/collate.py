"""Samples to the tensors of one batch: a row for each sample, or several samples in a row that do not see each other.

A tile that occurs several times in a batch is kept once; `tile_index` says which tile comes when.

Shapes: B rows, S sequence length, N tiles in order of use, U different tiles among them, (h, w) tile size, R regions in
the order of their marks, P tiles of the image with most of them, L patches of a tile.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenpacker.data.samples import Sample
from tokenpacker.sequence import IGNORED

DIGEST_BYTES = 16  # 128 bits: two different tiles of one batch never meet


def collate_padded(samples: Sequence[Sample], pad_token_id: int) -> dict[str, Any]:
    """One sample per row, padded on the right: `input_ids`, `labels`, `attention_mask` (B, S), and the tiles.

    The tiles are `pixel_values` (U, 3, h, w), U 0 without images, and `tile_index` (N,). For a model that knows regions
    there are `region_cells` (R, P, L) and `region_first_tile` (R,), which counts in `tile_index`; also where R is 0, so
    that the region encoder takes part in every step on every process.

    Raises:
        ValueError: without samples.
    """
    _require_samples(samples)
    shape = len(samples), max(len(sample.input_ids) for sample in samples)
    batch = _empty_rows(shape, pad_token_id)
    for row, sample in enumerate(samples):
        _write(batch, row, 0, sample)
    return batch | _tiles(samples) | _regions(samples)


def collate_packed(rows: Sequence[Sequence[Sample]], pad_token_id: int) -> dict[str, Any]:
    """Several samples per row, one after the other, padded on the right to the longest row.

    As `collate_padded`, and what keeps the samples of a row apart: `position_ids` (B, S) that restart in each sample
    and in the padding, and the bounds of these segments over all rows laid end to end, under the names by which
    transformers hands them to flash attention: `cu_seq_lens_q` and `_k` (segments + 1,), `max_length_q` and `_k`.
    The model takes these bounds as the sign that rows are packed.

    Raises:
        ValueError: without samples, and for one that `packing_problem` finds fault with.
    """
    samples = [sample for row in rows for sample in row]
    _require_samples(samples)
    for sample in samples:
        problem = packing_problem(sample)
        if problem is not None:
            raise ValueError(f"sample {sample.id} cannot be packed: {problem}")
    width = max(sum(len(sample.input_ids) for sample in row) for row in rows)
    batch = _empty_rows((len(rows), width), pad_token_id)
    segments: list[int] = []
    for number, row in enumerate(rows):
        start = 0
        for sample in row:
            _write(batch, number, start, sample)
            segments.append(len(sample.input_ids))
            start += segments[-1]
        if start < width:
            segments.append(width - start)
    return batch | _apart(segments, (len(rows), width)) | _tiles(samples) | _regions(samples)


def packing_problem(sample: Sample) -> str | None:
    """Why a sample cannot share a row, or None where it can.

    Its first token must not be learned, as the last token of the sample before would predict it; and no token in its
    midst may be masked, which flash attention cannot do within a segment.
    """
    if int(sample.labels[0]) != IGNORED:
        return f"labels[0]={int(sample.labels[0])} would be predicted by the sample before; set it to {IGNORED}"
    if not bool(sample.attention_mask.all()):
        place = int((sample.attention_mask == 0).int().argmax())
        return (
            f"attention_mask is 0 at token {place} (a literal padding token); take it out of the text, or do not pack"
        )
    return None


def _require_samples(samples: Sequence[Sample]) -> None:
    if not samples:
        raise ValueError("a batch needs at least one sample; it got none")


def _empty_rows(shape: tuple[int, int], pad_token_id: int) -> dict[str, Any]:
    return {
        "input_ids": torch.full(shape, pad_token_id),
        "labels": torch.full(shape, IGNORED),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
    }


def _write(batch: dict[str, Any], row: int, start: int, sample: Sample) -> None:
    place = slice(start, start + len(sample.input_ids))
    batch["input_ids"][row, place] = sample.input_ids
    batch["labels"][row, place] = sample.labels
    batch["attention_mask"][row, place] = sample.attention_mask


def _apart(segments: Sequence[int], shape: tuple[int, int]) -> dict[str, Any]:
    bounds = torch.tensor([0, *segments]).cumsum(0).to(torch.int32)  # the kernels want 32 bits
    positions = torch.cat([torch.arange(length) for length in segments]).view(shape)  # (B, S)
    longest = max(segments)
    return {
        "position_ids": positions,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _tiles(samples: Iterable[Sample]) -> dict[str, Any]:
    """The tiles of all samples in order, each different one once."""
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


def _regions(samples: Iterable[Sample]) -> dict[str, Any]:
    """The regions of all samples in order, their first tiles counted through the batch; nothing where no sample can."""
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


def _digest(tile: Tensor) -> bytes:
    data = tile.contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(data.data, digest_size=DIGEST_BYTES).digest()
