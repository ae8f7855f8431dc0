"""Packed tokens of tiles that were encoded before.

Shapes: N tiles, T packed tokens of a tile, D language width.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from threading import Lock

import torch
from torch import Tensor

from tokenpacker.hf import TokenPackerForConditionalGeneration
from tokenpacker.serve.embedded.model_threads import ModelThreads

FEWEST, MOST = 8, 16  # tiles that a thread encodes in one call; more leave a processor's cache, fewer cost more calls

TileKey = tuple[bytes, "int | None"]
"""Digest of a tile's pixels, and its scale factor, which is None for a projector that has none."""


def tile_key(tile: Tensor, scale_factor: int | None) -> TileKey:
    """Equal for tiles with equal packed tokens. The pixels are those after resizing and normalization."""
    return hashlib.blake2b(tile.contiguous().numpy().data, digest_size=16).digest(), scale_factor


class PackedCache:
    """Keeps the most recently used tiles' tokens, up to a number of bytes. Safe to use from many threads.

    They lie in memory of their own, which is written round and round: small tensors that live long would lie between
    the model's large ones, and keep memory in use that those no longer need.

    Attributes:
        bytes: held at present.
        hits: look-ups that found their tile.
        misses: look-ups that did not.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.bytes = self.hits = self.misses = 0
        self._memory = torch.empty(0, 0)  # (R, D), once D is known
        self._places: OrderedDict[TileKey, slice] = OrderedDict()  # rows of the memory, in the order of writing
        self._next = 0  # row to write next; what lies behind it is oldest
        self._lock = Lock()

    def __contains__(self, key: TileKey) -> bool:
        with self._lock:
            return key in self._places

    def get(self, key: TileKey) -> Tensor | None:
        """Packed tokens (T, D), or None."""
        with self._lock:
            place = self._places.get(key)
            if place is None:
                self.misses += 1
                return None
            self.hits += 1
            found, size = self._memory[place].clone(), len(self._memory)
            if (place.start - self._next) % size < size // 2:  # soon to be written over
                self._drop(key)
                self._write(key, found)
            return found

    def put(self, key: TileKey, tokens: Tensor) -> None:
        """Stores packed tokens (T, D) and drops the tiles that were not used for longest."""
        with self._lock:
            if key in self._places or tokens.nbytes > self.max_bytes:
                return
            if not len(self._memory):
                self._memory = tokens.new_empty(self.max_bytes // tokens[0].nbytes, tokens.shape[1])
            self._write(key, tokens)

    def _write(self, key: TileKey, tokens: Tensor) -> None:
        if self._next + len(tokens) > len(self._memory):
            self._drop_oldest(self._next, len(self._memory))
            self._next = 0
        place = slice(self._next, self._next + len(tokens))
        self._drop_oldest(place.start, place.stop)
        self._memory[place] = tokens
        self._places[key] = place
        self.bytes += tokens.nbytes
        self._next = place.stop

    def _drop_oldest(self, start: int, stop: int) -> None:
        """Drops the tiles in these rows."""
        while self._places:
            key, place = next(iter(self._places.items()))
            if place.start >= stop or place.stop <= start:
                return
            self._drop(key)

    def _drop(self, key: TileKey) -> None:
        self.bytes -= self._memory[self._places.pop(key)].nbytes

    def pack(
        self, model: TokenPackerForConditionalGeneration, tiles: Mapping[TileKey, Tensor], threads: ModelThreads
    ) -> dict[TileKey, Tensor]:
        """Packed tokens (T, D) of each tile (3, h, w). Those that are missing here are encoded."""

        def encode(keys: Sequence[TileKey]) -> Iterable[Tensor]:
            factors = [factor for _, factor in keys]
            return model.get_image_features(
                torch.stack([tiles[key] for key in keys]).to(model.device),
                scale_factors=None if None in factors else torch.tensor(factors),
                return_dict=True,
            ).pooler_output

        found = {key: self.get(key) for key in tiles}
        missing = [key for key, tokens in found.items() if tokens is None]
        missing.sort(key=lambda key: key[1] or 0)  # the projector runs once for each scale factor of a part
        parts = tile_parts(missing, threads.count)
        for keys, packed in zip(parts, threads.map(encode, parts), strict=True):
            for key, tokens in zip(keys, packed, strict=True):
                found[key] = tokens
                self.put(key, tokens)
        return {key: tokens for key, tokens in found.items() if tokens is not None}


def tile_parts(keys: list[TileKey], num_threads: int) -> list[list[TileKey]]:
    """The tiles of each call of the model: of one, unless there are enough to keep several threads busy."""
    if num_threads == 1 or len(keys) < FEWEST * num_threads:
        return [keys] if keys else []
    rounds = math.ceil(len(keys) / (MOST * num_threads))
    size = math.ceil(len(keys) / (rounds * num_threads))
    return [keys[start : start + size] for start in range(0, len(keys), size)]
