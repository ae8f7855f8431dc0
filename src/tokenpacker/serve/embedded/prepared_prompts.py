"""A question to token ids and tiles.

Shapes: N tiles of all images of a question, (h, w) tile size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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
        keys: of the N tiles.
        max_tokens: longest answer.
    """

    ids: list[int]
    tiles: Tensor | None
    keys: list[TileKey]
    sampling: Sampling
    max_tokens: int
    usage: Usage


def prepare_prompt(processor: TokenPackerProcessor, question: Question, *, max_length: int, max_tokens: int) -> Prompt:
    """The prompt of a question.

    Args:
        max_length: most tokens of prompt and answer together.
        max_tokens: most tokens of an answer. It is also the default.

    Raises:
        ValueError: for messages, images, options and lengths that the model cannot take.
    """
    _check(processor, question)
    options = {"scale_factor": question.scale_factor, "max_image_tokens": question.max_image_tokens}
    with no_files():
        try:
            text = processor.apply_chat_template(list(question.messages), add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise ValueError(f"the messages do not fit the chat template: {error}") from None
        inputs = processor([list(question.images)], [text], return_tensors="pt", **options)
        layouts = [processor.image_layout((image.height, image.width), **options) for image in question.images]
    ids = inputs["input_ids"][0].tolist()
    if processor.region_token_id is not None and processor.region_token_id in ids:
        raise ValueError(f"the messages hold the token {processor.region_token}; regions cannot be given here")
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
        usage=Usage(prompt_tokens=len(ids), image_tokens=sum(layout.num_tokens for layout in layouts)),
    )


def _check(processor: TokenPackerProcessor, question: Question) -> None:
    """Raises ValueError for marks in a text, as they would stand for an image, or end a message early."""
    texts, num_images = [], 0
    for kind, text in _parts(question):
        texts.append(text)
        num_images += kind in ("image", "image_url")
    if num_images != len(question.images):
        raise ValueError(
            f"the messages have {num_images} image parts but there are {len(question.images)} images; give one image"
            " for each part"
        )
    for token in processor.tokenizer.get_added_vocab():
        if any(token in text for text in texts):
            raise ValueError(f"a message holds {token!r}, which is a token of the model's own; leave it out")


def _parts(question: Question) -> Iterator[tuple[Any, str]]:
    """Type and text of each part of each message."""
    for message in question.messages:
        content = message.get("content")
        for part in content if isinstance(content, (list, tuple)) else [{"type": "text", "text": content}]:
            if not isinstance(part, dict):
                raise ValueError(f"a part of a message is given as {type(part).__name__}; pass a dict with a type")
            yield part.get("type"), str(part.get("text") or "")
