"""Rows that hold several samples which do not see each other, by transformers' own means."""

from __future__ import annotations

from typing import Any

from tokenpacker.hf.outputs import CACHE


def separate_samples(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a language model, changed where its rows are packed so that attention stays within a sample.

    `cu_seq_lens_q` is the sign of packed rows: where it is absent nothing changes. Flash attention reads the samples'
    bounds from it. The masks of the other kinds of attention are made from `position_ids` that restart in each sample,
    but only without `attention_mask` and without a cache; with either, samples would silently see each other. So both
    are switched off. Padding is then a segment of its own: nothing outside of it sees it.

    Raises:
        ValueError: for packed rows without `position_ids`, and with a cache.
    """
    if inputs.get("cu_seq_lens_q") is None:
        return inputs
    if inputs.get("position_ids") is None:
        raise ValueError("position_ids=None for packed rows; pass what `train.collate.collate_packed` makes")
    if inputs.get(CACHE) is not None or inputs.get("use_cache"):
        raise ValueError(f"{CACHE} or use_cache=True for packed rows; leave them out, these cannot be continued")
    return inputs | {"attention_mask": None, "use_cache": False}
