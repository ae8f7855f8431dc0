"""Compares the tensors of a checkpoint with those that its model needs: every one is used, or named in an error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokenpacker.checkpoints import tensor_names as names
from tokenpacker.checkpoints.weight_files import FETCH_AGAIN, Entry, listed, read, refused_as
from tokenpacker.hf.configuration import TokenPackerConfig
from tokenpacker.hf.model import TokenPackerForConditionalGeneration

# How far stored rotary frequencies may be from the config's: the rounding of bfloat16.
FREQUENCY_TOLERANCE = 1e-2


def shapes_of(config: TokenPackerConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors that a model of this config stores. Raises ValueError if none can be built."""
    with refused_as("no model can be built from the config"), torch.device("meta"):
        model = TokenPackerForConditionalGeneration(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def account(
    found: Mapping[str, Entry], expected: Mapping[str, tuple[int, ...]], config: TokenPackerConfig
) -> tuple[Entry, ...]:
    """The entries that the model needs, with our names in them.

    Args:
        found: entries by released name.
        expected: shapes by our names.

    Raises:
        ValueError: listing by name what is unknown, missing, of another shape, or stored under two names.
    """
    plan: dict[str, Entry] = {}
    taken: set[str] = set()
    unknown, wrong, twice = [], [], []
    for released, entry in found.items():
        if names.is_derived(released):
            continue
        ours = names.from_released(released, config.num_vision_layers)
        if not ours or any(name not in expected for name in ours):
            if not ours or not _is_unused_layer(ours[0], expected, config):
                unknown.append(released)
            continue
        shape = (sum(expected[name][0] for name in ours), *expected[ours[0]][1:])
        if entry.shape != shape or not entry.dtype.is_floating_point:
            kind = "" if entry.dtype.is_floating_point else f" of {entry.dtype}"
            wrong.append(f"{released} is {_shape(entry.shape)}{kind}, should be {_shape(shape)}")
        if taken.intersection(ours):
            twice.append(released)
        plan[released] = replace(entry, ours=ours)
        taken.update(ours)
    missing = {names.to_released(name, config.num_vision_layers) or name for name in expected} - set(plan)
    problems = {"unknown": unknown, "missing": missing, "wrong shape": wrong, "stored under two names": twice}
    if any(problems.values()):
        told = "; ".join(f"{len(which)} {what}: {listed(which)}" for what, which in problems.items() if which)
        raise ValueError(f"the checkpoint does not fit its config: {told}")
    return tuple(plan.values())


def _is_unused_layer(name: str, expected: Mapping[str, tuple[int, ...]], config: TokenPackerConfig) -> bool:
    """Whether the tower has this tensor in a layer that does not run, and the model does not keep it."""
    spare = names.spare_layer(name)
    if spare is None or config.keep_spare_vision_layers:
        return False
    return spare[0] < config.vision_config.num_hidden_layers - config.num_vision_layers and spare[1] in expected


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"


def dtypes_by_part(entries: Iterable[Entry]) -> dict[str, str]:
    """The type that each part was stored in, by the prefix of our names, and by full name where a tensor differs."""
    stored = {name: str(entry.dtype).removeprefix("torch.") for entry in entries for name in entry.ours}
    result: dict[str, str] = {}
    for prefix in (names.TOWER, names.SPARE_LAYERS, names.PROJECTOR, names.REGIONS, names.LANGUAGE_MODEL, "lm_head."):
        part = {name: dtype for name, dtype in stored.items() if name.startswith(prefix)}
        if part:
            result[prefix] = max(set(part.values()), key=list(part.values()).count)
            result |= {name: dtype for name, dtype in part.items() if dtype != result[prefix]}
    return result


def rotary_frequencies(found: Mapping[str, Entry], expected: Tensor, num_layers: int) -> dict[str, Any] | None:
    """The rotary frequencies that a checkpoint stores, once for all layers; None if it stores none.

    The model computes them from its config; they are kept to be written back.

    Args:
        expected: those of the config.

    Raises:
        ValueError: if layers lack them, or they differ between layers or from the config's.
    """
    stored = {name: match for name in found if (match := names.ROTARY_FREQUENCIES.fullmatch(name))}
    if not stored:
        return None
    if {int(match[1]) for match in stored.values()} != set(range(num_layers)):
        raise ValueError(
            f"the checkpoint has rotary_emb.inv_freq for {len(stored)} of {num_layers} layers; {FETCH_AGAIN}"
        )
    values = [tensor for _, tensor in read(found[name] for name in stored)]
    first = values[0]
    if any(first.dtype != value.dtype or not torch.equal(first, value) for value in values):
        raise ValueError(
            f"the checkpoint's rotary_emb.inv_freq differ between layers, which no LLaMA has; {FETCH_AGAIN}"
        )
    if first.shape != expected.shape or not torch.allclose(first.float(), expected, rtol=FREQUENCY_TOLERANCE):
        raise ValueError(
            "the checkpoint's rotary_emb.inv_freq are not those of its config; correct rope_theta or rope_scaling there"
        )
    return {"dtype": str(first.dtype).removeprefix("torch."), "values": first.double().tolist()}


def position_ids_shape(found: Mapping[str, Entry]) -> list[int] | None:
    """The shape of the tower's position ids, which count up from 0; None if a checkpoint does not store them."""
    entry = next((entry for name, entry in found.items() if names.POSITION_IDS.fullmatch(name)), None)
    return None if entry is None else list(entry.shape)
