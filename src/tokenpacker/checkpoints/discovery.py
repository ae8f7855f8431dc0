"""Finds the parts of a checkpoint in the original layout: its kind, its settings, and the file of each tensor.

A checkpoint is of one of three kinds, and each may hold a region module:

    complete   config and all weights; the vision tower is inside or named
    stage-1    a trained projector, to be joined with its base language model
    lora       an adapter and a projector, likewise
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from tokenpacker.checkpoints import tensor_names as names
from tokenpacker.checkpoints.lora import ADAPTER_CONFIG, Adapter
from tokenpacker.checkpoints.settings import ReleasedSettings, check_tile_limit, language_model_config
from tokenpacker.checkpoints.vision_tower import REMEDY, VisionTower, open_tower, tower_from_shapes
from tokenpacker.checkpoints.weight_files import (
    FETCH_AGAIN,
    Entry,
    has_weights,
    listed,
    read_json,
    stored_entries,
    weight_files,
)
from tokenpacker.hub import fetch
from tokenpacker.released import RELEASED_MODELS

STAGE_1_FILE, LORA_FILE = "mm_projector.bin", "non_lora_trainables.bin"
BASE_FILES = ("*.json", "model*.safetensors", "pytorch_model*.bin", "tokenizer.model")
CHECKPOINT_FILES = (*BASE_FILES, "adapter_model.*", STAGE_1_FILE, LORA_FILE)
SRC_REMEDY = "give a folder or hub id of a checkpoint in the original layout"
BASE_REMEDY = "give the language model that it was trained from with --base (base=)"
# What a stage may have trained beside an adapter, with the prefixes of the wrappers that it was saved from.
TRAINED_NAME = re.compile(
    r"(?:base_model\.model\.)?(?:model\.)?(mm_projector\..+|mask_extractor\..+|embed_tokens\.weight|lm_head\.weight)"
)
SAME_AS_BASE = ("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "hidden_act", "rope_parameters")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BESIDE_MODEL = (names.RELEASED_REGIONS, HEAD)  # released names that do not begin with `model.`
MAX_NEW_TOKENS = 3  # <im_patch>, <im_start>, <im_end>


@dataclass(frozen=True)
class Parts:
    """The parts of a checkpoint.

    Args:
        kind: `complete`, `stage-1` or `lora`.
        content: of its config.json.
        found: entries of all files by released name.
        tower_inside: whether the tower's tensors come from the checkpoint itself.
        folders: of the checkpoint and of its base, in the order in which files are looked for.
        notes: for the user.
    """

    kind: str
    content: dict[str, Any]
    settings: ReleasedSettings
    text_config: LlamaConfig
    found: dict[str, Entry]
    tower: VisionTower
    tower_inside: bool
    has_regions: bool
    adapter: Adapter | None
    folders: tuple[Path, ...]
    notes: tuple[str, ...]

    @property
    def tokenizer_folder(self) -> Path:
        """The folder with the tokenizer: the checkpoint's own or its base's."""
        files = ("tokenizer.model", "tokenizer.json")
        return next((f for f in self.folders if any((f / file).is_file() for file in files)), self.folders[0])


def find_parts(
    src: str, base: str | None, vision_tower: str | None, max_tiles: int | None, revision: str | None
) -> Parts:
    """The parts of the checkpoint `src`; for arguments and errors see `load_released`."""
    folder = fetch(src, CHECKPOINT_FILES, SRC_REMEDY, revision)
    if revision is not None and Path(src).expanduser().is_dir():
        raise ValueError(f"{src} is a folder here and has no revision {revision!r}; leave it out")
    where = str(folder / "config.json")
    content = read_json(folder / "config.json")
    settings = ReleasedSettings.read(content, where)
    text_config = language_model_config(content, where)
    kind = _kind(folder)
    notes = _differences(src, settings)
    if kind == "complete":
        if base is not None:
            raise ValueError(f"{src} holds a whole model and needs no base; leave --base (base=) out")
        folders: tuple[Path, ...] = (folder,)
        found = stored_entries(weight_files(folder))
    else:
        folders = (folder, _base_folder(kind, src, base, text_config))
        found = stored_entries(weight_files(folders[1]))
        found |= _trained(folder / (STAGE_1_FILE if kind == "stage-1" else LORA_FILE))
        found |= {name: _with_rows(found[name], text_config.vocab_size) for name in (EMBEDDING, HEAD) if name in found}
    tower, tower_inside = _add_tower(found, settings, vision_tower, notes)
    has_regions = any(name.startswith(names.RELEASED_REGIONS) for name in found)
    if has_regions and settings.image_mode != "slice":
        notes.append(
            f"config.json has image_aspect_ratio={settings.image_mode!r}, but a model with regions was trained on"
            " images cut into tiles: image_mode is 'slice'"
        )
        settings = replace(settings, image_mode="slice")
    if max_tiles is not None:
        settings = replace(settings, max_tiles=check_tile_limit(max_tiles, "max_tiles"))
    return Parts(
        kind=kind,
        content=content,
        settings=settings,
        text_config=text_config,
        found=found,
        tower=tower,
        tower_inside=tower_inside,
        has_regions=has_regions,
        adapter=Adapter.read(folder) if kind == "lora" else None,
        folders=folders,
        notes=tuple(notes),
    )


def _kind(folder: Path) -> str:
    if (folder / ADAPTER_CONFIG).is_file():
        if not (folder / LORA_FILE).is_file():
            raise ValueError(f"{folder} holds an adapter but no {LORA_FILE}, which has its projector; fetch it whole")
        return "lora"
    return "stage-1" if (folder / STAGE_1_FILE).is_file() and not has_weights(folder) else "complete"


def _differences(src: str, settings: ReleasedSettings) -> list[str]:
    """Notes on unknown keys of the config, and on where it differs from what was published; the config counts."""
    notes = []
    if settings.unknown:
        unknown = ", ".join(settings.unknown)
        notes.append(f"config.json has keys that no released model is known to have: {unknown}")
    model = next((model for model in RELEASED_MODELS if model.hub_id == src), None)
    if model is not None and model.max_tiles not in (None, settings.max_tiles):
        notes.append(
            f"config.json limits tiles to {settings.max_tiles} (9 where it is silent, as the original); {src} was"
            f" published with {model.max_tiles}: give --max-tiles {model.max_tiles} (max_tiles=) for that"
        )
    if model is not None and model.scale_factor != settings.scale_factor:
        notes.append(
            f"config.json has scale factor {settings.scale_factor} (2 where it is silent); {src} was published with"
            f" {model.scale_factor}: give --scale-factor {model.scale_factor} (scale_factor=) when you ask it"
        )
    return notes


def _base_folder(kind: str, src: str, base: str | None, text_config: LlamaConfig) -> Path:
    if base is None:
        holds = "only a projector" if kind == "stage-1" else "only an adapter and a projector"
        raise ValueError(f"{src} holds {holds}; {BASE_REMEDY}")
    folder = fetch(base, BASE_FILES, BASE_REMEDY)
    content = read_json(folder / "config.json")
    if content.get("model_type") != "llama":
        raise ValueError(
            f"base {base} is of the kind {content.get('model_type')!r}; a plain LLaMA such as Vicuna is needed"
        )
    other = language_model_config(content, str(folder / "config.json"))
    for key in SAME_AS_BASE:  # what no tensor's shape would tell
        if getattr(other, key) != getattr(text_config, key):
            theirs, ours = getattr(other, key), getattr(text_config, key)
            raise ValueError(f"base {base} has {key}={theirs} but {src} was trained with {ours}; {BASE_REMEDY}")
    return folder


def _trained(file: Path) -> dict[str, Entry]:
    """Entries that a stage trained, by released name. Raises ValueError for others, and for a name twice."""
    found: dict[str, Entry] = {}
    unknown = []
    for name, entry in stored_entries([file]).items():
        match = TRAINED_NAME.fullmatch(name)
        if match is None:
            unknown.append(name)
            continue
        released = match[1] if match[1].startswith(BESIDE_MODEL) else f"model.{match[1]}"
        if released in found:
            raise ValueError(f"{file} holds {released} under two names; {FETCH_AGAIN}")
        found[released] = entry
    if unknown:
        raise ValueError(f"{file} holds what its stage does not train: {listed(unknown)}")
    return found


def _with_rows(entry: Entry, rows: int) -> Entry:
    """The entry with `rows` rows, as the original adds rows for its few new tokens; itself if it has them."""
    new_rows = rows - entry.shape[0] if len(entry.shape) == 2 else 0
    if not 0 < new_rows <= MAX_NEW_TOKENS:
        return entry
    return replace(entry, shape=(rows, entry.shape[1]), new_rows=new_rows)


def _add_tower(
    found: dict[str, Entry], settings: ReleasedSettings, vision_tower: str | None, notes: list[str]
) -> tuple[VisionTower, bool]:
    """Adds the tower's tensors to `found` if they are not there. Returns the tower, and whether they were there."""
    inside = [name for name in found if name.startswith(names.RELEASED_TOWER)]
    if inside and vision_tower is not None:
        notes.append(f"the {len(inside)} vision tensors of the checkpoint are replaced by those of {vision_tower}")
        for name in inside:
            del found[name]
        inside = []
    tower = open_tower(vision_tower or settings.vision_tower, weights_needed=not inside)
    if tower is None:
        notes.append(
            f"the config of the vision tower {settings.vision_tower} is not on this machine: its sizes are taken from"
            " the checkpoint's tensors, the rest is OpenAI's CLIP"
        )
        tower = tower_from_shapes({name: found[name].shape for name in inside})
    if not inside:
        assert tower.folder is not None, "weights were asked for"
        for name, entry in stored_entries(weight_files(tower.folder)).items():
            if names.OTHER_CLIP_PARTS.match(name) is None:
                released = f"{names.RELEASED_TOWER}vision_model.{name.removeprefix('vision_model.')}"
                if released in found:
                    raise ValueError(f"{tower.folder} holds {name} under two names; {REMEDY}")
                found[released] = entry
    return tower, bool(inside)
