"""A checkpoint in the original layout, opened and ready to be read as a model of ours.

Three kinds: `complete` (config and all weights, the vision tower inside or beside), `stage-1` (a trained projector, to
be joined with its base language model), `lora` (an adapter and a projector, likewise). Each may hold a region module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from tokenpacker.checkpoints import tensor_names as names
from tokenpacker.checkpoints.accounts import (
    Entry,
    account,
    check_finite,
    dtypes_by_part,
    position_ids_shape,
    read,
    rotary_frequencies,
    shapes_of,
)
from tokenpacker.checkpoints.discovery import Parts, open_parts
from tokenpacker.checkpoints.lora import Adapter
from tokenpacker.checkpoints.settings import KEY_VALUE_LEVELS, ReleasedSettings, check_tile_limit
from tokenpacker.checkpoints.vision_tower import TowerSource
from tokenpacker.checkpoints.weight_files import read_json
from tokenpacker.hf.configuration import TokenPackerConfig
from tokenpacker.hf.processing.chat import chat_template
from tokenpacker.hf.processing.image_processor import RELEASED_OPTIONS, TokenPackerImageProcessor
from tokenpacker.hf.processing.llama_tokenizer import IMAGE_TOKEN, REGION_TOKEN, Variant, load_llama_tokenizer
from tokenpacker.hf.processing.processor import TokenPackerProcessor

Progress = Callable[[int], None]  # takes the bytes that were read since the last call
IMAGE_PATCH_TOKEN, IMAGE_START_TOKEN, IMAGE_END_TOKEN = "<im_patch>", "<im_start>", "<im_end>"


@dataclass(frozen=True)
class ReleasedCheckpoint:
    """An opened checkpoint.

    Args:
        kind: `complete`, `stage-1` or `lora`.
        entries: file -> name in the file -> entry, of all that will be read.
        targets: file -> name in the file -> our names.
        adapter: of a LoRA checkpoint.
        tokenizer_folder: holds the original tokenizer's files.
        notes: what the user should know.
    """

    kind: str
    config: TokenPackerConfig
    processor: TokenPackerProcessor
    generation_config: GenerationConfig
    entries: Mapping[Path, Mapping[str, Entry]]
    targets: Mapping[Path, Mapping[str, tuple[str, ...]]]
    adapter: Adapter | None
    tokenizer_folder: Path
    notes: tuple[str, ...]

    def require_adapter(self) -> Adapter:
        """The adapter that is to be kept. Raises ValueError where there is none."""
        if self.adapter is None:
            raise ValueError(f"a {self.kind} checkpoint has no adapter to keep; leave --keep-adapter (merge=False) out")
        return self.adapter

    @property
    def num_bytes(self) -> int:
        """Size of all tensors as stored."""
        return self.size_as(None)

    def size_as(self, dtype: torch.dtype | None) -> int:
        """Bytes of all tensors in a type; None keeps each one's own."""
        entries = (entry for group in self.entries.values() for entry in group.values())
        return sum(entry.num_elements * (dtype or entry.dtype).itemsize for entry in entries)

    def tensors(
        self,
        dtype: torch.dtype | None = None,
        merge: bool = True,
        progress: Progress | None = None,
        cast: bool = True,
    ) -> Iterator[tuple[str, Tensor]]:
        """Our names and tensors, file by file; they may be views of the files.

        Args:
            dtype: cast to it; None keeps each tensor's own.
            merge: add an adapter's updates to the weights.
            cast: False leaves the cast to the caller, who copies anyway.

        Raises:
            ValueError: for damaged files, and for weights that are not finite or too large for `dtype`.
        """
        for file, entries in self.entries.items():
            for entry, tensor in read(file, entries):
                where = f"{file}: {entry.stored_name}"
                check_finite(tensor, dtype, where)
                ours = self.targets[file][entry.stored_name]
                for name, part in zip(ours, names.split(tensor, len(ours)), strict=True):
                    if self.adapter is not None and merge and name in self.adapter.factors:
                        part = self.adapter.merge(name, part)
                        check_finite(part, dtype, f"{where}, with its adapter,")
                    yield name, part.to(dtype) if cast and dtype is not None else part
                if progress is not None:
                    progress(entry.num_elements * entry.dtype.itemsize)
                del tensor, part  # or they would hold their file while the next one is read


def open_checkpoint(
    src: str | Path,
    *,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    max_tiles: int | None = None,
    tokenizer_variant: Variant | None = None,
    revision: str | None = None,
) -> ReleasedCheckpoint:
    """The checkpoint in a folder or hub repository; its weights are looked at but not read.

    Args:
        base: language model of a stage-1 or LoRA checkpoint, folder or hub id.
        vision_tower: takes the place of the tower that the checkpoint holds or names.
        max_tiles: takes the place of the config's `patch_num`.
        tokenizer_variant: see `hf.tokenizer`; None takes the one that the checkpoint was trained with.
        revision: of `src` on the hub.

    Raises:
        ValueError: for whatever is missing, damaged, unknown or does not fit together.
    """
    parts = open_parts(str(src), _text(base), _text(vision_tower), revision)
    settings = parts.settings
    if max_tiles is not None:
        settings = replace(settings, max_tiles=check_tile_limit(max_tiles, "max_tiles"))
    tokenizer = load_llama_tokenizer(
        parts.tokenizer_folder,
        tokenizer_variant,
        extra_tokens=_extra_tokens(parts.content, settings),
        model_max_length=settings.context_length,
        vocab_size=parts.text_config.vocab_size,
        region_token=parts.has_regions,
    )
    config = _config(parts, tokenizer)
    expected = shapes_of(config)
    plan = account(parts.found, expected, config)
    if parts.adapter is not None:
        parts.adapter.check(expected)
    config.released = (config.released or {}) | {
        "dtypes": dtypes_by_part(plan, parts.found),
        "rotary_frequencies": rotary_frequencies(
            parts.found, _frequencies(parts.text_config), parts.text_config.num_hidden_layers
        ),
        "position_ids": position_ids_shape(parts.found) if parts.tower_inside else None,
    }
    config.dtype = parts.found["model.embed_tokens.weight"].dtype
    captions = parts.kind == "stage-1" and not parts.has_regions  # regions are learned from conversations
    template = chat_template(format="plain" if captions else "v1", image_start_end=settings.image_start_end)
    entries: dict[Path, dict[str, Entry]] = {}
    targets: dict[Path, dict[str, tuple[str, ...]]] = {}
    for released, ours in plan.items():
        entry = parts.found[released]
        entries.setdefault(entry.file, {})[entry.stored_name] = entry
        targets.setdefault(entry.file, {})[entry.stored_name] = ours
    return ReleasedCheckpoint(
        kind=parts.kind,
        config=config,
        processor=_processor(config, settings, parts.tower, tokenizer, template),
        generation_config=_generation_config(parts),
        entries=entries,
        targets=targets,
        adapter=parts.adapter,
        tokenizer_folder=parts.tokenizer_folder,
        notes=parts.notes,
    )


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)


def _config(parts: Parts, tokenizer: PreTrainedTokenizerFast) -> TokenPackerConfig:
    levels = list(KEY_VALUE_LEVELS)
    if parts.tower.config.num_hidden_layers < max(levels):
        raise ValueError(
            f"the vision tower has {parts.tower.config.num_hidden_layers} layers; released models read its levels"
            f" {', '.join(map(str, levels))}"
        )
    config = TokenPackerConfig(
        parts.tower.config,
        parts.text_config,
        projector_config={"name": "token-packer", "scale_factor": parts.settings.scale_factor},
        vision_levels=levels,
        vision_query_level=parts.settings.query_level,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        region_config={} if parts.has_regions else None,
        region_token_id=tokenizer.convert_tokens_to_ids(REGION_TOKEN) if parts.has_regions else None,
        keep_spare_vision_layers=parts.tower_inside,
        released={
            "kind": parts.kind,
            "config": parts.content,
            "tower_inside": parts.tower_inside,
            "tokenizer": str(parts.tokenizer_folder.absolute()),
        },
        architectures=["TokenPackerForConditionalGeneration"],
        pad_token_id=parts.text_config.pad_token_id,
        bos_token_id=parts.text_config.bos_token_id,
        eos_token_id=parts.text_config.eos_token_id,
    )
    scale_factor = parts.settings.scale_factor
    if scale_factor > min(config.patch_grid):
        rows, cols = config.patch_grid
        raise ValueError(
            f"the config has scale_factor={scale_factor}, which does not fit its tower's {rows}x{cols} patches"
        )
    return config


def _processor(
    config: TokenPackerConfig,
    settings: ReleasedSettings,
    tower: TowerSource,
    tokenizer: PreTrainedTokenizerFast,
    template: str,
) -> TokenPackerProcessor:
    images = TokenPackerImageProcessor(
        image_mode=settings.image_mode,
        tile_size=config.tile_size,
        max_tiles=settings.max_tiles,
        image_mean=tower.image_mean,
        image_std=tower.image_std,
        **RELEASED_OPTIONS,
    )
    return TokenPackerProcessor(
        images,
        tokenizer,
        chat_template=template,
        patch_grid=config.patch_grid,
        projector_config=config.projector_config,
        row_separator="unknown" if _lacks_newline(tokenizer) else "newline",
        region_rule="centre" if config.regions is not None else "coverage",
    )


def _lacks_newline(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the line break, looked up as the original does, is the unknown token; so it is in LLaMA's vocabulary."""
    return tokenizer.convert_tokens_to_ids("\n") in (None, tokenizer.unk_token_id)


def _extra_tokens(content: dict[str, Any], settings: ReleasedSettings) -> list[str]:
    """Tokens that the original adds to the tokenizer, in its order."""
    patch = [IMAGE_PATCH_TOKEN] if content.get("mm_use_im_patch_token") else []
    return patch + ([IMAGE_START_TOKEN, IMAGE_END_TOKEN] if settings.image_start_end else [])


def _generation_config(parts: Parts) -> GenerationConfig:
    """The token ids that open, end and pad; sampling settings only where the checkpoint asks for sampling."""
    file = next((f / "generation_config.json" for f in parts.folders if (f / "generation_config.json").is_file()), None)
    content = read_json(file) if file is not None else {}
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    kept = {key: content.get(key, getattr(parts.text_config, key, None)) for key in ids}
    if content.get("do_sample"):
        kept |= {key: content[key] for key in ("do_sample", "temperature", "top_p", "top_k") if key in content}
    if kept["pad_token_id"] is None:
        kept["pad_token_id"] = 0  # the original pads with the unknown token
    wrong = [key for key in ids if not _names_tokens(kept[key], parts.text_config.vocab_size, key == "eos_token_id")]
    if wrong:
        raise ValueError(f"{file or 'config.json'} has {wrong[0]}={kept[wrong[0]]!r}, which is no id of the vocabulary")
    try:
        return GenerationConfig(**kept)
    except Exception as error:  # transformers validates with several kinds
        raise ValueError(f"{file} is no generation config ({' '.join(str(error).split())[:200]})") from error


def _names_tokens(value: Any, vocab_size: int, several: bool) -> bool:
    values = value if several and isinstance(value, list) else [value]
    return all(type(entry) is int and 0 <= entry < vocab_size for entry in values)


def _frequencies(config: LlamaConfig) -> Tensor:
    """The rotary frequencies of a LLaMA config."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(config).inv_freq
