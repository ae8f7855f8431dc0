"""Checks that prompts have as many marks as images and regions, and each prompt its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tokenpacker.hf.processing.image_processor import flatten
from tokenpacker.hf.processing.llama_tokenizer import REGION_TOKEN
from tokenpacker.hf.regions.masks import split_regions
from tokenpacker.text import check_text

QUOTE = "\U000f0000"  # transformers writes it before a mark in a user's text, which counts as text then


def count_marks(mark: str, prompt: str) -> int:
    """The number of marks of images or regions in a prompt."""
    return len(re.findall(f"(?<!{QUOTE}){re.escape(mark)}", prompt))


def check_prompts(images: Any, text: Any, mark: str) -> None:
    """Raises ValueError for prompts that are no text, and if images and text were swapped."""
    prompts = text if isinstance(text, (list, tuple)) else [text]
    is_text = len(prompts) > 0 and all(isinstance(prompt, str) for prompt in prompts)
    first = images if isinstance(images, (list, tuple)) else [images]
    swapped = any(isinstance(entry, str) and (mark in entry or not is_text) for entry in first)
    if text is not None and (swapped or not is_text):
        given = "an empty list" if len(prompts) == 0 else type(text).__name__
        order = "; images come before text: processor(images, text)" if swapped else ""
        raise ValueError(f"text is given as {given}; pass a string or a list of strings{order}")
    for number, prompt in enumerate(prompts if is_text else [], start=1):
        check_text(prompt, "the prompt" if len(prompts) == 1 else f"prompt {number}")


def check_images(images: Any, prompts: Sequence[str], mark: str) -> None:
    """Raises ValueError if images and their marks differ in number, in total or in one prompt."""
    counts = [count_marks(mark, prompt) for prompt in prompts]
    given = flatten([] if images is None else images)
    if sum(counts) != len(given):
        raise ValueError(
            f"the number of {mark} tokens in the prompts should be the same as the number of images: {sum(counts)}"
            f" markers, {len(given)} images; write {mark} once for each image"
        )
    nested = [isinstance(entry, (list, tuple)) for entry in images] if isinstance(images, (list, tuple)) else []
    if not any(nested):
        return
    if not all(nested) or len(images) != len(prompts):
        raise ValueError(f"{len(images)} lists of images for {len(prompts)} prompts; pass one list per prompt")
    for number, (count, group) in enumerate(zip(counts, images, strict=True), start=1):
        num_images = len(flatten(group))
        if count != num_images:
            raise ValueError(
                f"prompt {number} needs as many {mark} markers as images: {count} markers, {num_images} images;"
                f" write {mark} once for each image"
            )


def check_regions(entries: Sequence[Any], prompts: Sequence[str], image_mark: str, known: bool) -> None:
    """Raises ValueError if a prompt's marks and the regions of its images differ in number.

    Args:
        entries: the regions of each image of all prompts, in order.
        known: whether the tokenizer has a token for regions; if not, their mark is ordinary text.
    """
    counts = [len(split_regions(entry)) for entry in entries]
    if not known and any(counts):
        raise ValueError(
            f"region_masks were given but the tokenizer has no token {REGION_TOKEN!r}; use a model"
            " that has learned regions; tokenpacker.hf.add_regions gives another what it needs to learn them"
        )
    start = 0
    for number, prompt in enumerate(prompts if known else [], start=1):
        stop = start + count_marks(image_mark, prompt)
        num_markers, num_regions = count_marks(REGION_TOKEN, prompt), sum(counts[start:stop])
        start = stop
        if num_markers != num_regions:
            where = "the prompt" if len(prompts) == 1 else f"prompt {number}"
            raise ValueError(
                f"{where} needs as many {REGION_TOKEN} markers as regions: {num_markers} markers, {num_regions}"
                f" regions; write {REGION_TOKEN} once for each region, and give its mask in region_masks"
            )
