"""Fits the thresholds of `scale_factor="auto"` to a model: by the loss that answers lose when one tile is coarser.

    images with questions -> the increase of the loss for each tile and scale factor -> thresholds

The increases of an image's tiles are taken as if they added up. The thresholds cost the fewest tokens for which the
increases of all tiles sum to at most `bound` times the loss with all tiles at the finest scale factor, as in ViR
(InternVL3.5, arXiv:2508.18265), whose router is taught by the ratio of these losses.

Shapes: N tiles of an image, V variants of its scale factors, K scale factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor
from tokenpacker.hf.outputs import ImageFeatures
from tokenpacker.hf.processing.prompts import ImageTokens, encode_prompts
from tokenpacker.router import Router, tile_details
from tokenpacker.scenes import Question, Sample
from tokenpacker.scenes.conversations import Segment, pack
from tokenpacker.sequence import IGNORED, ImageLayout

Array = npt.NDArray[Any]
ROWS = 8  # variants of an image at once
GRID = 40  # quantiles of the tiles' details that are tried as thresholds
BEYOND = 2.0  # a threshold above all tiles is this many times the largest detail


@dataclass(frozen=True)
class TileLoss:
    """What a tile's scale factor costs.

    Args:
        tokens: of the tile at each of K scale factors, its separator included.
        increases: of the loss of all answers about its image, at each of K scale factors; the first is 0.
    """

    detail: float
    is_thumbnail: bool
    tokens: tuple[int, ...]
    increases: tuple[float, ...]


def fit(
    model: TokenPackerForConditionalGeneration,
    processor: TokenPackerProcessor,
    samples: Iterable[Sample],
    scale_factors: Sequence[int],
    bound: float,
) -> Router:
    """The router of a model, from images with questions and their true answers that it was trained on.

    `processor.router = fit(...).to_dict()` and `processor.save_pretrained(folder)` put it beside the model.

    Args:
        scale_factors: that a tile may get, the finest first; the last should give one token.
        bound: most increase of the loss, as a share of that with all tiles at the finest.

    Raises:
        ValueError: for scale factors that the projector cannot have or that do not rise, questions about regions, and a
            bound too small.
    """
    base = 0.0
    tiles: list[TileLoss] = []
    for sample in samples:
        if not sample.questions:
            continue
        loss, own = tile_losses(model, processor, sample, scale_factors)
        base, tiles = base + loss, tiles + own
    return fit_router(base, tiles, scale_factors, bound)


@torch.inference_mode()
def tile_losses(
    model: TokenPackerForConditionalGeneration,
    processor: TokenPackerProcessor,
    sample: Sample,
    scale_factors: Sequence[int],
) -> tuple[float, list[TileLoss]]:
    """The loss of all answers about a sample with all tiles at the first scale factor, and what each tile costs."""
    config, image = model.config.projector, sample.image
    size, grid = (image.height, image.width), processor.image_layout((image.height, image.width)).tile_grid
    tiles = processor.image_processor([image], tile_grids=[grid])["pixel_values"].to(model.device)
    features = model.model.vision_features(tiles)
    packed = {factor: model.model.multi_modal_projector(features, factor) for factor in scale_factors}  # (N, T, D)
    variants = [[scale_factors[0]] * len(tiles)]
    for factor in scale_factors[1:]:
        variants += [[*variants[0][:tile], factor, *variants[0][tile + 1 :]] for tile in range(len(tiles))]
    separators = processor.image_layout(size).separators
    layouts = [
        ImageLayout(grid, [config.token_grid(model.config.patch_grid, s) for s in own], separators) for own in variants
    ]
    opening, segments = _segments(processor, sample.questions)
    losses: list[float] = []
    for start in range(0, len(variants), ROWS):
        rows, own = variants[start : start + ROWS], layouts[start : start + ROWS]
        shown = torch.cat([packed[factor][tile] for row in rows for tile, factor in enumerate(row)])
        losses += _losses(model, processor, opening, own, segments, shown)
    details = tile_details(tiles.cpu(), processor.image_processor.tile_views(size, grid), size)
    costs = [layout.tile_tokens for layout in layouts]
    found = []
    for tile, detail in enumerate(details):
        places = [0, *(1 + level * len(tiles) + tile for level in range(len(scale_factors) - 1))]
        found.append(
            TileLoss(
                detail,
                grid.has_thumbnail and tile == len(tiles) - 1,
                tuple(costs[place][tile] + separators for place in places),
                tuple(losses[place] - losses[0] for place in places),
            )
        )
    return losses[0], found


def _segments(processor: TokenPackerProcessor, questions: Sequence[Question]) -> tuple[list[int], list[Segment]]:
    """The ids before an image, and for each question those behind it with its answer, of which alone is learned."""
    tokenizer, mark = processor.tokenizer, processor.image_token_id
    if any(question.regions for question in questions):
        raise ValueError("a router is fitted to questions about whole images; leave those about regions out")
    asked = [[{"type": "image"}, {"type": "text", "text": question.text}] for question in questions]
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        for content in asked
    ]
    told = [
        f"{prompt} {question.answer}{tokenizer.eos_token}" for prompt, question in zip(prompts, questions, strict=True)
    ]
    shown = [[ImageTokens([mark], [""])]] * len(prompts)
    short, long = (
        encode_prompts(tokenizer, texts, shown, mark, {"padding": False})["input_ids"] for texts in (prompts, told)
    )
    start = long[0].index(mark)
    segments = []
    for prompt, whole in zip(short, long, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
        labels = [IGNORED] * same + whole[same:]
        segments.append(Segment(tuple(whole[start + 1 :]), tuple(labels[start + 1 :])))
    return long[0][:start], segments


def _losses(
    model: TokenPackerForConditionalGeneration,
    processor: TokenPackerProcessor,
    opening: list[int],
    layouts: Sequence[ImageLayout],
    segments: Sequence[Segment],
    packed: Any,
) -> list[float]:
    """For each layout the sum over the answers of their mean loss a token."""
    ids = (processor.image_token_id, processor.tile_separator_id, processor.row_separator_id)
    prefixes = [[*opening, *layout.token_ids(*ids)] for layout in layouts]
    batch = pack(prefixes, [segments] * len(layouts), processor.tokenizer.pad_token_id or 0)
    labels = batch.pop("labels").to(model.device)
    inputs: dict[str, Any] = {name: tensor.to(model.device) for name, tensor in batch.items()}
    inputs["attention_mask"] = inputs["attention_mask"].to(model.dtype)
    logits = model(**inputs, mm_encoder_outputs={"image": ImageFeatures(pooler_output=packed)}).logits
    each = F.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none"
    )
    lengths = [len(segment.input_ids) for segment in segments]
    found = []
    for losses, known, prefix in zip(each, labels[:, 1:] != IGNORED, prefixes, strict=True):
        end = len(prefix) - 1 + sum(lengths)
        parts = zip(
            losses[len(prefix) - 1 : end].split(lengths), known[len(prefix) - 1 : end].split(lengths), strict=True
        )
        found.append(sum(float(part.sum() / is_answer.sum()) for part, is_answer in parts))
    return found


def fit_router(base: float, tiles: Iterable[TileLoss], scale_factors: Sequence[int], bound: float) -> Router:
    """The thresholds that cost the fewest tokens while the increases sum to at most `bound * base`.

    A tile without any detail always gets the largest scale factor. Without thumbnails, theirs are those of all tiles.

    Raises:
        ValueError: for a bound below what the tiles without detail lose.
    """
    groups: tuple[list[TileLoss], list[TileLoss]] = ([], [])
    for tile in tiles:
        groups[tile.is_thumbnail].append(tile)
    limits, tokens, lost = _choices(groups[0])
    small_limits, small_tokens, small_lost = _choices(groups[1]) if groups[1] else ([()], np.zeros(1), np.zeros(1))
    order = np.lexsort((tokens, lost))
    cheapest = np.minimum.accumulate(tokens[order])
    found = []
    for small in range(len(small_limits)):
        count = int(np.searchsorted(lost[order], bound * base - small_lost[small], side="right"))
        if count:
            place = order[int(np.argmax(tokens[order][:count] == cheapest[count - 1]))]
            found.append((tokens[place] + small_tokens[small], place, small))
    if not found:
        raise ValueError(f"bound={bound} is below what tiles without detail lose; give a larger one")
    _, place, small = min(found)
    detail, thumbnail_detail = limits[place], small_limits[small] or limits[place]
    return Router(scale_factors=tuple(scale_factors), detail=detail, thumbnail_detail=thumbnail_detail)


def _choices(tiles: Sequence[TileLoss]) -> tuple[list[tuple[float, ...]], Array, Array]:
    """All thresholds on a grid of quantiles, with the tokens and the increases that each gives."""
    tiles = sorted(tiles, key=lambda tile: tile.detail)
    details = np.array([tile.detail for tile in tiles])
    seen = details[details > 0]
    limits = np.unique([*np.quantile(seen, np.linspace(0, 1, GRID)), BEYOND * seen.max()])[::-1] if len(seen) else [1.0]
    places = [int(np.searchsorted(details, limit)) for limit in limits]  # so many tiles lie below
    costs, increases = (
        np.concatenate([np.zeros((1, len(values[0]))), np.cumsum(values, axis=0)])
        for values in ([tile.tokens for tile in tiles], [tile.increases for tile in tiles])
    )
    found: list[tuple[float, ...]] = []
    tokens: list[float] = []
    lost: list[float] = []
    for chosen in combinations_with_replacement(range(len(limits)), len(tiles[0].tokens) - 1):
        ends = [len(tiles), *(places[number] for number in chosen), 0]
        for sums, to in ((costs, tokens), (increases, lost)):
            to.append(sum(sums[end, k] - sums[ends[k + 1], k] for k, end in enumerate(ends[:-1])))
        found.append(tuple(round(float(limits[number]), 6) for number in chosen))
    return found, np.array(tokens), np.array(lost)
