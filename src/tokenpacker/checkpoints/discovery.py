"""The files behind a checkpoint in the original layout, gathered: which kind it is and where each tensor comes from."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from tokenpacker.checkpoints import tensor_names as names
from tokenpacker.checkpoints.accounts import Entry, collect, grow, listed
from tokenpacker.checkpoints.lora import ADAPTER_CONFIG, Adapter
from tokenpacker.checkpoints.settings import ReleasedSettings, language_model_config
from tokenpacker.checkpoints.vision_tower import REMEDY, TowerSource, open_tower, tower_from_shapes
from tokenpacker.checkpoints.weight_files import has_weights, read_json, weight_files
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
BESIDE_MODEL = (names.RELEASED_REGIONS, HEAD)


@dataclass(frozen=True)
class Parts:
    """What a checkpoint is made of.

    Args:
        kind: `complete`, `stage-1` or `lora`.
        content: of its config.json.
        found: released name -> entry, over all files.
        tower_inside: whether the tower's tensors come from the checkpoint itself.
        has_regions: whether it is a model that knows regions.
        folders: of the checkpoint and of its base, in the order in which files are looked for.
    """

    kind: str
    content: dict[str, Any]
    settings: ReleasedSettings
    text_config: LlamaConfig
    found: dict[str, Entry]
    tower: TowerSource
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


def open_parts(src: str, base: str | None, vision_tower: str | None, revision: str | None) -> Parts:
    """The parts of the checkpoint `src`. Raises ValueError as `source.open_checkpoint`."""
    folder = fetch(src, CHECKPOINT_FILES, SRC_REMEDY, revision)
    if revision is not None and Path(src).expanduser().is_dir():
        raise ValueError(f"{src} is a folder here and has no revision {revision!r}; leave it out")
    where = str(folder / "config.json")
    content = read_json(folder / "config.json")
    settings = ReleasedSettings.read(content, where)
    text_config = language_model_config(content, where)
    kind = _kind(folder)
    notes = [f"config.json has keys that no released model is known to have: {', '.join(settings.unknown)}"]
    notes = notes if settings.unknown else []
    notes += _differences(src, settings)
    if kind == "complete":
        if base is not None:
            raise ValueError(f"{src} holds a whole model and needs no base; leave --base (base=) out")
        folders: tuple[Path, ...] = (folder,)
        found = collect(weight_files(folder))
    else:
        folders = (folder, _base_folder(kind, src, base, text_config))
        found = collect(weight_files(folders[1]))
        found |= _trained(folder / (STAGE_1_FILE if kind == "stage-1" else LORA_FILE))
        found |= {name: grow(found[name], text_config.vocab_size) for name in (EMBEDDING, HEAD) if name in found}
    tower, tower_inside = _add_tower(found, settings, vision_tower, notes)
    has_regions = any(name.startswith(names.RELEASED_REGIONS) for name in found)
    if has_regions:
        settings = _cut_always(settings, notes)
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


def _differences(src: str, settings: ReleasedSettings) -> list[str]:
    """Notes where a released model's config is not what was published of it; the config counts."""
    model = next((model for model in RELEASED_MODELS if model.hub_id == src), None)
    notes = []
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


def _cut_always(settings: ReleasedSettings, notes: list[str]) -> ReleasedSettings:
    """The settings of a model with regions: its branch cuts every image, whatever the config says."""
    if settings.image_mode != "slice":
        notes.append(
            f"config.json has image_aspect_ratio={settings.image_mode!r}, but a model with regions was trained on"
            " images cut into tiles: image_mode is 'slice'"
        )
    return replace(settings, image_mode="slice")


def _kind(folder: Path) -> str:
    if (folder / ADAPTER_CONFIG).is_file():
        if not (folder / LORA_FILE).is_file():
            raise ValueError(f"{folder} holds an adapter but no {LORA_FILE}, which has its projector; fetch it whole")
        return "lora"
    return "stage-1" if (folder / STAGE_1_FILE).is_file() and not has_weights(folder) else "complete"


def _base_folder(kind: str, src: str, base: str | None, text_config: LlamaConfig) -> Path:
    if base is None:
        holds = "only a projector" if kind == "stage-1" else "only an adapter and a projector"
        raise ValueError(f"{src} holds {holds}; {BASE_REMEDY}")
    folder = fetch(base, BASE_FILES, BASE_REMEDY)
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type != "llama":
        raise ValueError(f"base {base} is of the kind {model_type!r}; a plain LLaMA such as Vicuna is needed")
    other = language_model_config(read_json(folder / "config.json"), str(folder / "config.json"))
    for key in SAME_AS_BASE:  # what no tensor's shape would tell
        if getattr(other, key) != getattr(text_config, key):
            theirs, ours = getattr(other, key), getattr(text_config, key)
            raise ValueError(f"base {base} has {key}={theirs} but {src} was trained with {ours}; {BASE_REMEDY}")
    return folder


def _trained(file: Path) -> dict[str, Entry]:
    """What a stage trained, by released names. Raises ValueError for what no stage trains, and for a name twice."""
    stored = collect([file])
    unknown = [name for name in stored if TRAINED_NAME.fullmatch(name) is None]
    if unknown:
        raise ValueError(f"{file} holds what its stage does not train: {listed(unknown)}")
    renamed = {_trained_name(name): entry for name, entry in stored.items()}
    if len(renamed) < len(stored):
        raise ValueError(f"{file} holds the same tensor under two names; fetch it anew")
    return renamed


def _trained_name(name: str) -> str:
    """The released name of a tensor in a file of trained parts, which wrappers may have prefixed."""
    match = TRAINED_NAME.fullmatch(name)
    if match is None:
        return name
    return match[1] if match[1].startswith(BESIDE_MODEL) else f"model.{match[1]}"


def _add_tower(
    found: dict[str, Entry], settings: ReleasedSettings, vision_tower: str | None, notes: list[str]
) -> tuple[TowerSource, bool]:
    """Adds the tower's tensors to `found` unless they are there; the tower, and whether they were."""
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
        for name, entry in collect(weight_files(tower.folder)).items():
            if names.OTHER_CLIP_PARTS.match(name) is None:
                released = f"{names.RELEASED_TOWER}vision_model.{name.removeprefix('vision_model.')}"
                if released in found:
                    raise ValueError(f"{tower.folder} holds {name} under two names; {REMEDY}")
                found[released] = entry
    return tower, bool(inside)
