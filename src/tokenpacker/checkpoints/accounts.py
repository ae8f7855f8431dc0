"""Every tensor of a checkpoint accounted for: which is ours, which is missing, unknown or of the wrong shape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenpacker.checkpoints import tensor_names as names
from tokenpacker.checkpoints.weight_files import FETCH_AGAIN, read_tensors, stored_tensors
from tokenpacker.hf.configuration import TokenPackerConfig
from tokenpacker.hf.model import TokenPackerForConditionalGeneration

MAX_NEW_TOKENS = 3  # <im_patch>, <im_start>, <im_end>
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
    """The entry with as many rows, as the original adds rows for its few new tokens; itself where it has them."""
    if len(entry.shape) != 2 or not 0 < rows - entry.shape[0] <= MAX_NEW_TOKENS:
        return entry
    return replace(entry, shape=(rows, entry.shape[1]), rows=rows)


def read(file: Path, entries: Mapping[str, Entry]) -> Iterator[tuple[Entry, Tensor]]:
    """Entries of one file with their tensors, grown where they have to."""
    for name, tensor in read_tensors(file, entries):
        entry = entries[name]
        if entry.rows is not None:
            mean = tensor.float().mean(dim=0, keepdim=True).to(tensor.dtype)
            tensor = torch.cat([tensor, mean.expand(entry.rows - tensor.shape[0], -1)])
        yield entry, tensor


def check_finite(tensor: Tensor, dtype: torch.dtype | None, where: str) -> None:
    """Raises ValueError for a tensor that holds NaN or infinity, or would in another type.

    The smallest and the largest number tell: no mask as large as the tensor is made.
    """
    if not tensor.numel():
        return
    low, high = torch.aminmax(tensor)
    if not bool(low.isfinite() & high.isfinite()):
        raise ValueError(f"{where} holds NaN or infinity, so the file is damaged; {FETCH_AGAIN}")
    if dtype is not None and max(-low.item(), high.item()) > torch.finfo(dtype).max:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"{where} holds numbers too large for {name}; use bfloat16 or float32")


def account(
    found: Mapping[str, Entry], expected: Mapping[str, tuple[int, ...]], config: TokenPackerConfig
) -> dict[str, tuple[str, ...]]:
    """Released name -> our names, for all that is needed.

    Args:
        found: by released name.
        expected: shapes by our names.

    Raises:
        ValueError: listing by name what is unknown, missing, of another shape, or there under two names.
    """
    plan: dict[str, tuple[str, ...]] = {}
    taken: set[str] = set()
    unknown, wrong, twice = [], [], []
    for released, entry in found.items():
        if names.is_derived(released):
            continue
        ours = names.from_released(released, config.num_vision_layers)
        if ours is None or any(name not in expected for name in ours):
            if ours is None or not _is_unused_layer(ours[0], expected, config):
                unknown.append(released)
            continue
        shape = (sum(expected[name][0] for name in ours), *expected[ours[0]][1:])
        if entry.shape != shape or not entry.dtype.is_floating_point:
            kind = "" if entry.dtype.is_floating_point else f" of {entry.dtype}"
            wrong.append(f"{released} is {_shape(entry.shape)}{kind}, should be {_shape(shape)}")
        if taken.intersection(ours):
            twice.append(released)
        plan[released] = ours
        taken.update(ours)
    missing = sorted({names.to_released(name, config.num_vision_layers) or name for name in expected} - set(plan))
    problems = {"unknown": unknown, "missing": missing, "wrong shape": wrong, "stored under two names": twice}
    if any(problems.values()):
        told = "; ".join(f"{len(which)} {what}: {listed(which)}" for what, which in problems.items() if which)
        raise ValueError(f"the checkpoint does not fit its config: {told}")
    return plan


def _is_unused_layer(name: str, expected: Mapping[str, tuple[int, ...]], config: TokenPackerConfig) -> bool:
    """Whether the tower has this tensor, in a layer above the last that runs, and the model does not keep it."""
    place = names.first_layer_name(name)
    if place is None or config.keep_spare_vision_layers:
        return False
    return place[0] < config.vision_config.num_hidden_layers - config.num_vision_layers and place[1] in expected


def shapes_of(config: TokenPackerConfig) -> dict[str, tuple[int, ...]]:
    """Our names and shapes of all that a model of this config stores. Raises ValueError where none can be built."""
    try:
        with torch.device("meta"):
            model = TokenPackerForConditionalGeneration(config)
    except Exception as error:  # of many kinds, for configs that contradict themselves
        raise ValueError(f"no model can be built from the config ({' '.join(str(error).split())[:200]})") from error
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def rotary_frequencies(found: Mapping[str, Entry], expected: Tensor, num_layers: int) -> dict[str, Any] | None:
    """The rotary frequencies that a checkpoint stores, once for all layers; None where it stores none.

    The model computes them from its config; they are kept to be written back.

    Args:
        expected: those of the config.

    Raises:
        ValueError: when they are not there for all layers, or differ between layers or from the config's.
    """
    stored = {name: match for name in found if (match := names.ROTARY_FREQUENCIES.fullmatch(name))}
    if not stored:
        return None
    if {int(match[1]) for match in stored.values()} != set(range(num_layers)):
        raise ValueError(
            f"the checkpoint has rotary_emb.inv_freq for {len(stored)} of {num_layers} layers; fetch it anew"
        )
    values: list[Tensor] = []
    for file in {found[name].file: None for name in stored}:
        wanted = [found[name].stored_name for name in stored if found[name].file == file]
        values += [tensor for _, tensor in read_tensors(file, wanted)]
    first = values[0]
    if any(first.dtype != value.dtype or not torch.equal(first, value) for value in values):
        raise ValueError(
            "the checkpoint's rotary_emb.inv_freq differ between layers, which no LLaMA has; fetch it anew"
        )
    if first.shape != expected.shape or not torch.allclose(first.float(), expected, rtol=FREQUENCY_TOLERANCE):
        raise ValueError(
            "the checkpoint's rotary_emb.inv_freq are not those of its config; correct rope_theta or rope_scaling there"
        )
    return {"dtype": str(first.dtype).removeprefix("torch."), "values": first.double().tolist()}


def position_ids_shape(found: Mapping[str, Entry]) -> list[int] | None:
    """The shape of the tower's position ids, which count up from 0; None where a checkpoint does not store them."""
    entry = next((entry for name, entry in found.items() if names.POSITION_IDS.fullmatch(name)), None)
    return None if entry is None else list(entry.shape)


def dtypes_by_part(plan: Mapping[str, tuple[str, ...]], found: Mapping[str, Entry]) -> dict[str, str]:
    """What each part was stored in, by the prefix of our names; single tensors that differ, by their full name."""
    stored = {
        name: str(found[released].dtype).removeprefix("torch.") for released, ours in plan.items() for name in ours
    }
    result: dict[str, str] = {}
    for prefix in (names.TOWER, names.SPARE_LAYERS, names.PROJECTOR, names.REGIONS, names.LANGUAGE_MODEL, "lm_head."):
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
