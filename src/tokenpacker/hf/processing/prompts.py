"""Prompts to token ids with the images among them: tokenized and cut, then expanded, then padded.

A row is the tokenizer's output for one prompt: lists that are as long as its ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import accumulate, pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from tokenpacker.hf.processing.llama_tokenizer import encode_as_trained

Row = dict[str, list[Any]]

PAD_OPTIONS = ("padding", "max_length", "pad_to_multiple_of", "padding_side", "return_attention_mask")
PADDED_BY_TOKENIZER = ("input_ids", "attention_mask", "token_type_ids", "special_tokens_mask")
PADDING = {"offset_mapping": (0, 0), "mm_token_type_ids": 0}
TOKENIZERS_ALONE = (
    "text_pair",
    "text_target",
    "text_pair_target",
    "is_split_into_words",
    "return_overflowing_tokens",
    "return_length",
)
EXTRAS = ("return_offsets_mapping", "return_special_tokens_mask", "return_token_type_ids")
NO_LIMIT = 10**9  # transformers writes a larger number where a tokenizer has no limit


@dataclass(frozen=True)
class ImageTokens:
    """The tokens that stand in a prompt for one image.

    Args:
        ids: of its tokens, separators among them.
        texts: of the same tokens.
    """

    ids: list[int]
    texts: list[str]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    images: Sequence[Sequence[ImageTokens]],
    mark: int,
    options: dict[str, Any],
    *,
    offsets_in_expanded_text: bool = False,
) -> dict[str, Any]:
    """Rows by name, padded if asked for.

    `mm_token_type_ids` are 1 for the tokens of images, separators included. `offset_mapping` refers to the prompts as
    given, or with `offsets_in_expanded_text` to prompts with `ImageTokens.texts` in place of each mark.

    Args:
        images: those of each prompt, in order.
        mark: id of the token that stands for an image.
        options: of a tokenizer's call.

    Raises:
        ValueError: for options that are not supported together with images, and for truncation that would cut an image.
    """
    for name in TOKENIZERS_ALONE:
        if options.get(name):
            raise ValueError(f"{name}={options[name]!r} cannot be honoured beside images; call processor.tokenizer")
    padding = {name: options[name] for name in PAD_OPTIONS if name in options}
    limit = _limit(tokenizer, options.get("truncation"), options.get("max_length"))
    asked = {
        name: value
        for name, value in options.items()
        if name not in (*PAD_OPTIONS, "truncation", "return_tensors") or name == "return_attention_mask"
    }
    rows = []
    for prompt, shown in zip(prompts, images, strict=True):
        room = None if limit is None else limit - sum(len(image.ids) - 1 for image in shown)
        row = _encode(tokenizer, prompt, asked, options.get("truncation"), room)
        if row["input_ids"].count(mark) != len(shown):
            raise ValueError(
                "truncation would cut images apart; leave it out and bound them with max_image_tokens, or raise"
                f" max_length={limit}"
            )
        rows.append(_expand(row, shown, mark, offsets_in_expanded_text))
    return _pad(tokenizer, rows, padding)


def _limit(tokenizer: PreTrainedTokenizerBase, truncation: Any, max_length: int | None) -> int | None:
    """The length to cut at; None for none."""
    if truncation in (None, False, "do_not_truncate"):
        return None
    limit = tokenizer.model_max_length if max_length is None else max_length
    return None if limit > NO_LIMIT else limit


def _encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, options: dict[str, Any], truncation: Any, limit: int | None
) -> Row:
    """One prompt, its images still marks. A start token that it begins with is not added again."""
    start = tokenizer.bos_token
    starts = bool(start) and prompt.startswith(start)
    options = options | ({"add_special_tokens": False} if starts else {})
    cut = {} if limit is None else {"truncation": truncation, "max_length": max(limit, 0)}
    if not tokenizer.init_kwargs.get("llama_variant") or options.get("sanitize_control_tokens"):
        return dict(tokenizer(prompt, **options, **cut))
    # Released weights need this: see `encode_as_trained` for the ids that a plain call cannot give.
    opens = starts or options.get("add_special_tokens", True)
    body = encode_as_trained(tokenizer, prompt[len(start) :] if starts else prompt)
    ids: list[int] = [tokenizer.bos_token_id, *body] if opens else body
    row: Row = {"input_ids": ids}
    if options.get("return_attention_mask") is not False:
        row["attention_mask"] = [1] * len(ids)
    if any(options.get(name) for name in EXTRAS):
        row |= _extras(dict(tokenizer(prompt, **options)), ids)
    if limit is not None and len(ids) > limit:
        left = tokenizer.truncation_side == "left"
        kept = slice(max(0, len(ids) - limit), None) if left else slice(max(limit, 0))
        row = {name: values[kept] for name, values in row.items()}
    return row


def _extras(row: Row, ids: list[int]) -> Row:
    """The other lists of a row, for `ids` instead of the row's own; where these differ, each gets the span of all."""
    extras: Row = {name: [] for name in row if name not in ("input_ids", "attention_mask")}
    for _, first, last, start, stop in SequenceMatcher(None, row["input_ids"], ids, autojunk=False).get_opcodes():
        for name, values in extras.items():
            told = row[name][first:last]
            if last - first != stop - start or row["input_ids"][first:last] != ids[start:stop]:
                before = row[name][first - 1] if first else (0, 0)
                whole = (told[0][0], told[-1][1]) if told and name == "offset_mapping" else before
                told = [whole if name == "offset_mapping" else 0] * (stop - start)
            values += told
    return extras


def _expand(row: Row, images: Sequence[ImageTokens], mark: int, offsets_in_expanded_text: bool) -> Row:
    """The row with each mark replaced by its image's tokens; other values are repeated."""
    remaining = iter(images)
    expanded: Row = {name: [] for name in [*row, "mm_token_type_ids"]}
    gained = 0  # characters, by the images so far
    for place, token_id in enumerate(row["input_ids"]):
        image = next(remaining) if token_id == mark else ImageTokens([token_id], [])
        for name, values in row.items():
            expanded[name] += image.ids if name == "input_ids" else [values[place]] * len(image.ids)
        expanded["mm_token_type_ids"] += [int(token_id == mark)] * len(image.ids)
        if offsets_in_expanded_text and "offset_mapping" in row:
            start, stop = row["offset_mapping"][place]
            ends = list(accumulate(map(len, image.texts), initial=start)) if token_id == mark else [start, stop]
            spans = [(first + gained, last + gained) for first, last in pairwise(ends)]
            expanded["offset_mapping"][-len(image.ids) :] = spans
            gained += ends[-1] - stop
    return expanded


def _pad(tokenizer: PreTrainedTokenizerBase, rows: list[Row], options: dict[str, Any]) -> dict[str, Any]:
    batch = {name: [row[name] for row in rows] for name in rows[0]}
    known = {name: batch.pop(name) for name in PADDED_BY_TOKENIZER if name in batch}
    padded = dict(tokenizer.pad(known, **options))
    left = (options.get("padding_side") or tokenizer.padding_side) == "left"
    for name, values in batch.items():  # the tokenizer does not pad what it does not know
        for row, ids in zip(values, padded["input_ids"], strict=True):
            added = [PADDING.get(name, 0)] * (len(ids) - len(row))
            row[:] = [*added, *row] if left else [*row, *added]
    return padded | batch
