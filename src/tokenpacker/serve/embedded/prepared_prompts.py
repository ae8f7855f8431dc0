"""A question to token ids and tiles.

Shapes: N tiles of all images of a question, (h, w) tile size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from tokenpacker.hf import TokenPackerProcessor
from tokenpacker.images import no_files
from tokenpacker.serve.embedded.packed_cache import TileKey, tile_key
from tokenpacker.serve.questions import Question, Sampling, Usage


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the model gets for a question.

    Args:
        ids: of the prompt, placeholders of images among them.
        tiles: (N, 3, h, w) pixels, in the order of their placeholders; None without images.
        regions: `region_cells` and `region_first_tile` of R regions, in the order of their marks; empty without any.
        keys: of the N tiles.
        max_tokens: longest answer.
    """

    ids: list[int]
    tiles: Tensor | None
    keys: list[TileKey]
    sampling: Sampling
    max_tokens: int
    usage: Usage
    regions: dict[str, Tensor] = field(default_factory=dict)


def prepare_prompt(processor: TokenPackerProcessor, question: Question, *, max_length: int, max_tokens: int) -> Prompt:
    """The prompt of a question.

    Args:
        max_length: most tokens of prompt and answer together.
        max_tokens: most tokens of an answer. It is also the default.

    Raises:
        ValueError: for messages, images, options and lengths that the model cannot take.
    """
    _check_images(question)
    options = {"scale_factor": question.scale_factor, "max_image_tokens": question.max_image_tokens}
    masks = [[region for image, region in question.regions if image == place] for place in range(len(question.images))]
    with no_files():
        text = fill_template(processor, question.messages, with_regions=bool(question.regions))
        inputs = processor(
            [list(question.images)], [text], masks, return_tensors="pt", return_mm_token_type_ids=True, **options
        )
    ids = inputs["input_ids"][0].tolist()
    if len(ids) >= max_length:
        raise ValueError(
            f"the prompt has {len(ids)} tokens but prompt and answer have room for {max_length}; use fewer or shorter"
            " messages, fewer images, a larger scale_factor or a smaller max_image_tokens"
        )
    tiles, factors = inputs.get("pixel_values"), inputs.get("scale_factors")
    numbers = [None] * len(tiles if tiles is not None else ()) if factors is None else factors.tolist()
    wanted = max_tokens if question.sampling.max_tokens is None else question.sampling.max_tokens
    return Prompt(
        ids=ids,
        tiles=tiles,
        keys=[] if tiles is None else [tile_key(tile, factor) for tile, factor in zip(tiles, numbers, strict=True)],
        sampling=question.sampling,
        max_tokens=min(wanted, max_tokens, max_length - len(ids)),
        usage=Usage(prompt_tokens=len(ids), image_tokens=int(inputs["mm_token_type_ids"].sum())),
        regions=_as_marked(inputs, [image for image, _ in question.regions]),
    )


def _as_marked(inputs: Any, images: Sequence[int]) -> dict[str, Tensor]:
    """The regions in the order of their marks, of which the images are given. The processor orders them by image."""
    by_image = sorted(range(len(images)), key=lambda place: images[place])
    order = torch.tensor(by_image, dtype=torch.int64).argsort()
    return {name: inputs[name][order] for name in ("region_cells", "region_first_tile")} if images else {}


def _check_images(question: Question) -> None:
    parts = [part for message in question.messages for part in _parts(message)]
    places = sum(part.get("type") in ("image", "image_url") for part in parts)
    if places != len(question.images):
        raise ValueError(
            f"the messages have {places} image parts but there are {len(question.images)} images; give one image for"
            " each part"
        )


def fill_template(
    processor: TokenPackerProcessor, messages: Sequence[dict[str, Any]], *, with_regions: bool = False
) -> str:
    """The prompt as text.

    Raises:
        ValueError: for messages that do not fit the template, and for texts that would write one of the model's own
            tokens, which could stand for an image or end a message. With regions, their mark may be written.
    """
    try:
        text, bare = (
            processor.apply_chat_template(list(form), add_generation_prompt=True, tokenize=False)
            for form in (messages, map(_without_texts, messages))
        )
    except TemplateError as error:
        raise ValueError(f"the messages do not fit the chat template: {error}") from None
    for token in processor.tokenizer.get_added_vocab():
        if text.count(token) != bare.count(token) and not (token == processor.region_token and with_regions):
            raise ValueError(f"a message writes {token!r}, which is a token of the model's own; leave it out")
    return text


def _without_texts(message: dict[str, Any]) -> dict[str, Any]:
    """The message with a letter in place of each text."""
    parts = [part | {"text": "x"} if part.get("text") else part for part in _parts(message)]
    content = message.get("content")
    return message | {"content": parts if isinstance(content, (list, tuple)) else content and "x"}


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a message; none if its content is a text."""
    content = message.get("content")
    parts = list(content) if isinstance(content, (list, tuple)) else []
    for part in parts:
        if not isinstance(part, dict):
            raise ValueError(f"a part of a message is given as {type(part).__name__}; pass a dict with a type")
    return parts
