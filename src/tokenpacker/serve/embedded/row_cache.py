"""A key/value cache whose rows come and go.

transformers' `DynamicCache` copies all keys and values at every step, which takes most of a step of a small model. This
one writes into spare room. Rows end at the same column, so they are padded on the left.

Shapes: B rows, S columns, H heads, D head width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

SPARE_COLUMNS = 64


class RowCache(Cache):
    """The cache of a model with `num_layers` attention layers, at first without rows."""

    layers: list[RowLayer]

    def __init__(self, num_layers: int):
        super().__init__(layers=[RowLayer() for _ in range(num_layers)])

    def add(self, cache: Cache) -> None:
        """Adds the rows of another cache behind the others."""
        for layer, new in zip(self.layers, cache.layers, strict=True):
            layer.add(new.keys, new.values)

    def drop(self, row: int, unused: int) -> None:
        """Moves the last row to the place of `row`, and then drops the first `unused` columns."""
        for layer in self.layers:
            layer.drop(row, unused)


class RowLayer(DynamicLayer):
    """Keys and values (B, H, S, D) as views of the used part of larger buffers.

    All columns of a row are finite: a NaN that the mask hides would still spoil the row's sums.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: list[Tensor] = []
        self._rows = self._start = self._end = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends columns (B, H, new, D) and returns all of them."""
        new, states = key_states.shape[2], (key_states, value_states)
        self._make_room(states, self._rows, before=0, after=new)
        for buffer, columns in zip(self._buffers, states, strict=True):
            buffer[: self._rows, :, self._end : self._end + new] = columns
        self._end += new
        self._show()
        return self.keys, self.values

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Appends rows (new, H, length, D), so that they end at the same column as the others."""
        rows, length = self._rows + keys.shape[0], keys.shape[2]
        self._make_room((keys, values), rows, before=length, after=0)
        first = self._end - length
        start = min(first, self._start)
        for buffer, states in zip(self._buffers, (keys, values), strict=True):
            buffer[: self._rows, :, start : self._start] = 0
            buffer[self._rows : rows, :, start:first] = 0
            buffer[self._rows : rows, :, first : self._end] = states
        self._rows, self._start = rows, start
        self._show()

    def drop(self, row: int, unused: int) -> None:
        """Moves the last row to the place of `row`, and then drops the first `unused` columns."""
        for states in (self.keys, self.values):
            states[row] = states[-1]
        self._rows -= 1
        self._start += unused
        if not self._rows:  # the next rows get the same buffers: to take new ones costs more than to fill them
            self._start = self._end = self._buffers[0].shape[2] - SPARE_COLUMNS
        self._show()

    def _make_room(self, states: tuple[Tensor, Tensor], rows: int, before: int, after: int) -> None:
        """Takes larger buffers if `rows` rows, or the columns before and after the end, do not fit."""
        if self._buffers:
            have, _, columns, _ = self._buffers[0].shape
            if rows <= have and before <= self._end and self._end + after <= columns:
                return
        used = self._end - self._start
        end = max(used, before)
        spare = (rows + rows // 4, states[0].shape[1], end + after + SPARE_COLUMNS)
        buffers = [new.new_empty(*spare, new.shape[3]) for new in states]  # columns are written before they show
        for buffer, old in zip(buffers, (self.keys, self.values) if self._rows else (), strict=False):
            buffer[: self._rows, :, end - used : end] = old
        self._buffers, self._start, self._end = buffers, end - used, end

    def _show(self) -> None:
        self.keys, self.values = (buffer[: self._rows, :, self._start : self._end] for buffer in self._buffers)
        self.is_initialized = True
