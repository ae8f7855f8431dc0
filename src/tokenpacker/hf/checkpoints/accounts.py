"""Every tensor of a checkpoint accounted for: which is ours, which is missing, unknown or of the wrong shape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenpacker.hf.checkpoints import names
from tokenpacker.hf.checkpoints.files import read_tensors, stored_tensors
from tokenpacker.hf.config import TokenPackerConfig
from tokenpacker.hf.model import TokenPackerForConditionalGeneration

MAX_LISTED = 40  # names in an error message
# How far stored rotary frequencies may be from the config's: the rounding of bfloat16.
FREQUENCY_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Entry:
    """One tensor to be read: where it is, what it is called there, and what is known of it.

    `rows` is set where the matrix grows to that many rows, the new ones being the mean of the old.
    """

    file: Path
    stored_name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: int | None = None

    @property
    def num_elements(self) -> int:
        """Numbers in the tensor."""
        return torch.Size(self.shape).numel()


def collect(files: Iterable[Path]) -> dict[str, Entry]:
    """Stored name -> entry, over all files. Raises ValueError as `files.stored_tensors`."""
    found = stored_tensors(list(files))
    return {name: Entry(stored.file, name, stored.shape, stored.dtype) for name, stored in found.items()}


def grow(entry: Entry, rows: int) -> Entry:
    """The entry with as many rows, as the original adds rows for new tokens; itself where it has them."""
    return entry if entry.shape[0] >= rows else replace(entry, shape=(rows, *entry.shape[1:]), rows=rows)


def read(file: Path, entries: Mapping[str, Entry]) -> Iterator[tuple[Entry, Tensor]]:
    """Entries of one file with their tensors, grown where they have to."""
    for name, tensor in read_tensors(file, entries):
        entry = entries[name]
        if entry.rows is not None:
            mean = tensor.float().mean(dim=0, keepdim=True).to(tensor.dtype)
            tensor = torch.cat([tensor, mean.expand(entry.rows - tensor.shape[0], -1)])
        yield entry, tensor


def account(
    found: Mapping[str, Entry], expected: Mapping[str, tuple[int, ...]], num_vision_layers: int
) -> dict[str, tuple[str, ...]]:
    """Released name -> our names, for all that is needed.

    Args:
        found: by released name.
        expected: shapes by our names.

    Raises:
        ValueError: listing by name what is unknown, missing or of another shape.
    """
    plan: dict[str, tuple[str, ...]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    unknown, wrong = [], []
    for released, entry in found.items():
        if names.is_derived(released):
            continue
        ours = names.from_released(released, num_vision_layers)
        if ours is None or any(name not in expected for name in ours):
            if not names.is_spare(released, num_vision_layers):
                unknown.append(released)
            continue
        rows = sum(expected[name][0] for name in ours)
        shape = (rows, *expected[ours[0]][1:])
        if entry.shape != shape:
            wrong.append(f"{released} is {_shape(entry.shape)}, should be {_shape(shape)}")
        plan[released] = ours
        shapes |= dict.fromkeys(ours, shape)
    missing = sorted({names.to_released(name, num_vision_layers) or name for name in expected if name not in shapes})
    if unknown or missing or wrong:
        problems = {"unknown": unknown, "missing": missing, "wrong shape": wrong}
        told = "; ".join(f"{len(which)} {what}: {listed(which)}" for what, which in problems.items() if which)
        is_region = any(name.startswith(names.REGION_PREFIXES) for name in unknown)
        hint = " (mask_extractor belongs to a region model, which is no plain TokenPacker model)" if is_region else ""
        raise ValueError(f"the checkpoint does not fit its config: {told}{hint}")
    return plan


def shapes_of(config: TokenPackerConfig) -> dict[str, tuple[int, ...]]:
    """Our names and shapes of all that a model of this config stores."""
    with torch.device("meta"):
        model = TokenPackerForConditionalGeneration(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def rotary_frequencies(found: Mapping[str, Entry], expected: Tensor) -> dict[str, Any] | None:
    """The rotary frequencies that a checkpoint stores, once for all layers; None where it stores none.

    The model computes them from its config; they are kept to be written back.

    Args:
        expected: those of the config.

    Raises:
        ValueError: when they differ between layers or from the config's.
    """
    stored = [entry for name, entry in found.items() if names.ROTARY_FREQUENCIES.fullmatch(name)]
    values: list[Tensor] = []
    for file in {entry.file: None for entry in stored}:
        values += [tensor for _, tensor in read_tensors(file, [e.stored_name for e in stored if e.file == file])]
    if not values:
        return None
    first = values[0]
    if any(not torch.equal(first, value) for value in values):
        raise ValueError(
            "the checkpoint's rotary_emb.inv_freq differ between layers, which no LLaMA has; fetch it anew"
        )
    if first.shape != expected.shape or not torch.allclose(first.float(), expected, rtol=FREQUENCY_TOLERANCE):
        raise ValueError(
            "the checkpoint's rotary_emb.inv_freq are not those of its config; correct rope_theta or rope_scaling there"
        )
    return {"dtype": str(first.dtype).removeprefix("torch."), "values": first.double().tolist(), "layers": len(values)}


def dtypes_by_part(plan: Mapping[str, tuple[str, ...]], found: Mapping[str, Entry]) -> dict[str, str]:
    """What each part was stored in, by the prefix of our names; single tensors that differ, by their full name."""
    stored = {
        name: str(found[released].dtype).removeprefix("torch.") for released, ours in plan.items() for name in ours
    }
    result: dict[str, str] = {}
    for prefix in (names.TOWER, names.SPARE_LAYERS, names.PROJECTOR, names.LANGUAGE_MODEL, "lm_head."):
        part = {name: dtype for name, dtype in stored.items() if name.startswith(prefix)}
        if part:
            result[prefix] = max(set(part.values()), key=list(part.values()).count)
            result |= {name: dtype for name, dtype in part.items() if dtype != result[prefix]}
    return result


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"


def listed(entries: list[str]) -> str:
    """The names in order, cut short where there are too many for a message."""
    more = f", and {len(entries) - MAX_LISTED} more" if len(entries) > MAX_LISTED else ""
    return ", ".join(sorted(entries)[:MAX_LISTED]) + more
