"""A checkpoint in the original layout, opened: config, processor, and tensors that are read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast

from tokenpacker.checkpoints.discovery import EMBEDDING, Parts, find_parts
from tokenpacker.checkpoints.lora import Adapter
from tokenpacker.checkpoints.settings import KEY_VALUE_LEVELS
from tokenpacker.checkpoints.tensor_names import account, shapes_of, storage_record
from tokenpacker.checkpoints.weight_files import Entry, Progress, check_finite, read, read_json, refused_as
from tokenpacker.hf.configuration import TokenPackerConfig
from tokenpacker.hf.processing.chat import chat_template
from tokenpacker.hf.processing.image_processor import RELEASED_OPTIONS, TokenPackerImageProcessor
from tokenpacker.hf.processing.llama_tokenizer import IMAGE_TOKEN, REGION_TOKEN, Variant, load_llama_tokenizer
from tokenpacker.hf.processing.processor import TokenPackerProcessor

IMAGE_PATCH_TOKEN, IMAGE_START_TOKEN, IMAGE_END_TOKEN = "<im_patch>", "<im_start>", "<im_end>"


@dataclass(frozen=True)
class ReleasedCheckpoint:
    """An opened checkpoint.

    Args:
        entries: all stored tensors that the model needs, with our names in them.
        merged: adapter whose updates are added to the weights.
        kept: adapter that stays beside the weights.
    """

    parts: Parts
    config: TokenPackerConfig
    processor: TokenPackerProcessor
    generation_config: GenerationConfig
    entries: tuple[Entry, ...]
    merged: Adapter | None
    kept: Adapter | None

    def tensors(
        self, dtype: torch.dtype | None = None, progress: Progress | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Our names and tensors in their stored types, file by file; they may be views of the files.

        Args:
            dtype: that the caller casts them to.

        Raises:
            ValueError: for damaged files, and for weights that are not finite or too large for `dtype`.
        """
        for entry, tensor in read(self.entries, progress):
            where = f"{entry.file}: {entry.name}"
            check_finite(tensor, dtype, where)
            for name, part in zip(entry.ours, tensor.chunk(len(entry.ours)), strict=True):
                if self.merged is not None and name in self.merged.factors:
                    part = self.merged.merge(name, part)
                    check_finite(part, dtype, f"{where}, with its adapter,")
                yield name, part
            del tensor, part  # or they would hold their file while the next one is read


def open_checkpoint(
    src: str | Path,
    *,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    merge: bool = True,
    max_tiles: int | None = None,
    tokenizer_variant: Variant | None = None,
    revision: str | None = None,
) -> ReleasedCheckpoint:
    """The checkpoint in a folder or hub repository; its weights are listed but not read.

    Arguments and errors are those of `load_released`.
    """
    base, vision_tower = (None if path is None else str(path) for path in (base, vision_tower))
    parts = find_parts(str(src), base, vision_tower, max_tiles, revision)
    if not merge and parts.adapter is None:
        raise ValueError(f"a {parts.kind} checkpoint has no adapter to keep; leave --keep-adapter (merge=False) out")
    # Tokens that the original adds to the tokenizer, in its order.
    added = [IMAGE_PATCH_TOKEN] if parts.content.get("mm_use_im_patch_token") else []
    added += [IMAGE_START_TOKEN, IMAGE_END_TOKEN] if parts.settings.image_start_end else []
    tokenizer = load_llama_tokenizer(
        parts.tokenizer_folder,
        tokenizer_variant,
        extra_tokens=added,
        model_max_length=parts.settings.context_length,
        vocab_size=parts.text_config.vocab_size,
        region_token=parts.has_regions,
    )
    config = _config(parts, tokenizer)
    expected = shapes_of(config)
    entries = account(parts.found, expected, config)
    if parts.adapter is not None:
        parts.adapter.check(expected)
    config.released = (config.released or {}) | storage_record(parts.found, entries, parts.text_config)
    config.dtype = parts.found[EMBEDDING].dtype
    return ReleasedCheckpoint(
        parts=parts,
        config=config,
        processor=_processor(parts, config, tokenizer),
        generation_config=_generation_config(parts),
        entries=entries,
        merged=parts.adapter if merge else None,
        kept=None if merge else parts.adapter,
    )


def _config(parts: Parts, tokenizer: PreTrainedTokenizerFast) -> TokenPackerConfig:
    if parts.tower.config.num_hidden_layers < max(KEY_VALUE_LEVELS):
        raise ValueError(
            f"the vision tower has {parts.tower.config.num_hidden_layers} layers; released models read its levels"
            f" {', '.join(map(str, KEY_VALUE_LEVELS))}"
        )
    scale_factor = parts.settings.scale_factor
    config = TokenPackerConfig(
        parts.tower.config,
        parts.text_config,
        projector_config={"name": "token-packer", "scale_factor": scale_factor},
        vision_levels=list(KEY_VALUE_LEVELS),
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
    rows, cols = config.patch_grid
    if scale_factor > min(rows, cols):
        raise ValueError(
            f"the config has scale_factor={scale_factor}, which does not fit its tower's {rows}x{cols} patches"
        )
    return config


def _processor(parts: Parts, config: TokenPackerConfig, tokenizer: PreTrainedTokenizerFast) -> TokenPackerProcessor:
    images = TokenPackerImageProcessor(
        image_mode=parts.settings.image_mode,
        tile_size=config.tile_size,
        max_tiles=parts.settings.max_tiles,
        image_mean=parts.tower.image_mean,
        image_std=parts.tower.image_std,
        **RELEASED_OPTIONS,
    )
    captions = parts.kind == "stage-1" and not parts.has_regions  # regions are learned from conversations
    # The original looks the line break up in the vocabulary. LLaMA's lacks it, which gives the unknown token.
    lacks_newline = tokenizer.convert_tokens_to_ids("\n") in (None, tokenizer.unk_token_id)
    return TokenPackerProcessor(
        images,
        tokenizer,
        chat_template=chat_template(
            format="plain" if captions else "v1", image_start_end=parts.settings.image_start_end
        ),
        patch_grid=config.patch_grid,
        projector_config=config.projector_config,
        row_separator="unknown" if lacks_newline else "newline",
        region_rule="centre" if parts.has_regions else "coverage",
    )


def _generation_config(parts: Parts) -> GenerationConfig:
    """Token ids for begin, end and padding, with sampling settings only if the checkpoint asks for sampling."""
    file = next((f / "generation_config.json" for f in parts.folders if (f / "generation_config.json").is_file()), None)
    content = read_json(file) if file is not None else {}
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    kept: dict[str, Any] = {key: content.get(key, getattr(parts.text_config, key, None)) for key in ids}
    if content.get("do_sample"):
        kept |= {key: content[key] for key in ("do_sample", "temperature", "top_p", "top_k") if key in content}
    if kept["pad_token_id"] is None:
        kept["pad_token_id"] = 0  # the original pads with the unknown token
    for key in ids:
        several = key == "eos_token_id" and isinstance(kept[key], list)
        values = kept[key] if several else [kept[key]]
        if not all(type(value) is int and 0 <= value < parts.text_config.vocab_size for value in values):
            raise ValueError(f"{file or 'config.json'} has {key}={kept[key]!r}, which is no id of the vocabulary")
    with refused_as(f"{file} is no generation config"):
        return GenerationConfig(**kept)
