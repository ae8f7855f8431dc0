"""The names of tensors in released models and in ours, and the check that a checkpoint has exactly what a model needs.

Released models have `model.*` and `lm_head` of a LLaMA, `model.mm_projector.*`, the CLIP tower below a doubled prefix,
and with regions `mask_extractor.*`, which is not below `model.`. Ours are `model.language_model.*`, `lm_head`,
`model.multi_modal_projector.*`, `model.vision_tower.*` and `model.region_encoder.*`.

The released attention stores its query, key and value projections as one matrix; ours stores three.

transformers' `WeightRenaming` and `WeightConverter` could express this table, but they work only inside
`from_pretrained` and `save_pretrained`: unknown tensors are a warning there, all `.bin` files are in memory at once,
and the way back starts from a whole model in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tokenpacker.checkpoints.weight_files import FETCH_AGAIN, Entry, listed, read, refused_as
from tokenpacker.hf.configuration import TokenPackerConfig
from tokenpacker.hf.model import TokenPackerForConditionalGeneration

RELEASED_TOWER = "model.vision_tower.vision_tower."
RELEASED_PROJECTOR = "model.mm_projector."
RELEASED_REGIONS = "mask_extractor."
TOWER, PROJECTOR, LANGUAGE_MODEL = "model.vision_tower.", "model.multi_modal_projector.", "model.language_model."
REGIONS = "model.region_encoder."
SPARE_LAYERS = "model.spare_vision_layers."  # layers above the last one used, kept only for converting back

# (prefix of the released name, prefix of our name); the first that fits counts.
_PREFIXES = (
    (f"{RELEASED_TOWER}vision_model.", TOWER),
    (RELEASED_TOWER, TOWER),  # as newer libraries save a CLIP
    (f"{RELEASED_PROJECTOR}q_proj_1.", f"{PROJECTOR}query_proj."),
    (f"{RELEASED_PROJECTOR}k_proj_1.", f"{PROJECTOR}key_mlp."),
    (f"{RELEASED_PROJECTOR}v_proj_1.", f"{PROJECTOR}value_mlp."),
    (f"{RELEASED_PROJECTOR}ln_q_1.", f"{PROJECTOR}query_norm."),
    (f"{RELEASED_PROJECTOR}ln_k_1.", f"{PROJECTOR}key_norm."),
    (f"{RELEASED_PROJECTOR}ln_v_1.", f"{PROJECTOR}value_norm."),
    (f"{RELEASED_PROJECTOR}clip_attn.out_proj.", f"{PROJECTOR}attention.output_proj."),
    (f"{RELEASED_PROJECTOR}mlp.", f"{PROJECTOR}output_mlp."),
    (f"{RELEASED_REGIONS}res_layers.", f"{REGIONS}level_projs."),
    (f"{RELEASED_REGIONS}feat_linear.", f"{REGIONS}output_proj."),
    ("lm_head.", "lm_head."),
    ("model.", LANGUAGE_MODEL),
)
# Released tensors that are three of ours, stacked along their rows.
_STACKED = {
    f"{RELEASED_PROJECTOR}clip_attn.in_proj_{kind}": tuple(
        f"{PROJECTOR}attention.{part}_proj.{kind}" for part in ("query", "key", "value")
    )
    for kind in ("weight", "bias")
}
_LAYER = re.compile(re.escape(TOWER) + r"encoder\.layers\.(\d+)\.(.+)")
_SPARE_LAYER = re.compile(re.escape(SPARE_LAYERS) + r"(\d+)\.(.+)")

# Buffers that are computed from the config. `storage_record` keeps what is needed to write them back.
ROTARY_FREQUENCIES = re.compile(r"model\.layers\.(\d+)\.self_attn\.rotary_emb\.inv_freq")
POSITION_IDS = re.compile(re.escape(RELEASED_TOWER) + r"vision_model\.embeddings\.position_ids")
# How far stored rotary frequencies may be from the config's: the rounding of bfloat16.
FREQUENCY_TOLERANCE = 1e-2
# What the files of a CLIP hold beside the weights of its vision tower.
OTHER_CLIP_PARTS = re.compile(
    r"text_model\.|text_projection|visual_projection|logit_scale|(vision_model\.)?embeddings\.position_ids"
)


def from_released(name: str, num_layers: int) -> tuple[str, ...]:
    """Our names for a released tensor: three for a stacked one, none for a name that no released model has.

    Args:
        num_layers: layers of our vision tower; those above are spare.
    """
    if name in _STACKED:
        return _STACKED[name]
    ours = next((ours + name.removeprefix(theirs) for theirs, ours in _PREFIXES if name.startswith(theirs)), None)
    if ours is None:
        return ()
    layer = _LAYER.fullmatch(ours)
    if layer is not None and int(layer[1]) >= num_layers:
        return (f"{SPARE_LAYERS}{int(layer[1]) - num_layers}.{layer[2]}",)
    return (ours,)


def to_released(name: str, num_layers: int) -> str | None:
    """The released name of our tensor; None if there is none. Tensors that are stacked there share one name."""
    stacked = next((theirs for theirs, ours in _STACKED.items() if name in ours), None)
    if stacked is not None:
        return stacked
    spare = _SPARE_LAYER.fullmatch(name)
    if spare is not None:
        name = f"{TOWER}encoder.layers.{num_layers + int(spare[1])}.{spare[2]}"
    return next((theirs + name.removeprefix(ours) for theirs, ours in _PREFIXES if name.startswith(ours)), None)


def is_derived(name: str) -> bool:
    """Whether a released tensor follows from the config, so that no model needs it."""
    return ROTARY_FREQUENCIES.fullmatch(name) is not None or POSITION_IDS.fullmatch(name) is not None


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
        expected: shapes by our name.

    Raises:
        ValueError: listing by name what is unknown, missing, of another shape, or stored under two names.
    """
    plan: dict[str, Entry] = {}
    taken: set[str] = set()
    unknown, wrong, twice = [], [], []
    for released, entry in found.items():
        if is_derived(released):
            continue
        ours = from_released(released, config.num_vision_layers)
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
    missing = {to_released(name, config.num_vision_layers) or name for name in expected} - set(plan)
    problems = {"unknown": unknown, "missing": missing, "wrong shape": wrong, "stored under two names": twice}
    if any(problems.values()):
        told = "; ".join(f"{len(which)} {what}: {listed(which)}" for what, which in problems.items() if which)
        raise ValueError(f"the checkpoint does not fit its config: {told}")
    return tuple(plan.values())


def _is_unused_layer(name: str, expected: Mapping[str, tuple[int, ...]], config: TokenPackerConfig) -> bool:
    """Whether the tensor belongs to an unused vision layer that the config does not keep."""
    spare = _SPARE_LAYER.fullmatch(name)
    if spare is None or config.keep_spare_vision_layers:
        return False
    num_spare = config.vision_config.num_hidden_layers - config.num_vision_layers
    return int(spare[1]) < num_spare and f"{TOWER}encoder.layers.0.{spare[2]}" in expected


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"


def storage_record(found: Mapping[str, Entry], entries: Iterable[Entry], text_config: LlamaConfig) -> dict[str, Any]:
    """What our config keeps so that a checkpoint can be written back bit for bit.

    `dtypes` has the most frequent stored type by prefix of our names. A tensor with another type has an entry under its
    full name. `rotary_frequencies` (of one layer) and `position_ids` (their shape; they count from 0) are buffers that
    a model computes; None if they are not stored.

    Raises:
        ValueError: if layers lack rotary frequencies, or they differ between layers or from the config's.
    """
    stored = {name: str(entry.dtype).removeprefix("torch.") for entry in entries for name in entry.ours}
    dtypes: dict[str, str] = {}
    for prefix in (TOWER, SPARE_LAYERS, PROJECTOR, REGIONS, LANGUAGE_MODEL, "lm_head."):
        part = {name: dtype for name, dtype in stored.items() if name.startswith(prefix)}
        if part:
            dtypes[prefix] = max(set(part.values()), key=list(part.values()).count)
            dtypes |= {name: dtype for name, dtype in part.items() if dtype != dtypes[prefix]}
    ids = next((entry for name, entry in found.items() if POSITION_IDS.fullmatch(name)), None)
    return {
        "dtypes": dtypes,
        "rotary_frequencies": _rotary_frequencies(found, text_config),
        "position_ids": None if ids is None else list(ids.shape),
    }


def _rotary_frequencies(found: Mapping[str, Entry], text_config: LlamaConfig) -> dict[str, Any] | None:
    stored = {name: match for name in found if (match := ROTARY_FREQUENCIES.fullmatch(name))}
    if not stored:
        return None
    num_layers = text_config.num_hidden_layers
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
    expected = LlamaRotaryEmbedding(text_config).inv_freq
    if first.shape != expected.shape or not torch.allclose(first.float(), expected, rtol=FREQUENCY_TOLERANCE):
        raise ValueError(
            "the checkpoint's rotary_emb.inv_freq are not those of its config; correct rope_theta or rope_scaling there"
        )
    return {"dtype": str(first.dtype).removeprefix("torch."), "values": first.double().tolist()}
