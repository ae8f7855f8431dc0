"""Osprey-724K: conversations about masks of COCO's images, in five families (Yuan et al., 2024).

Each file is a list of {"id", "file_name", "height", "width", "annotation": [{"segmentation", ...}]} with either
`conversations`, in which `<region2>` stands for the second annotation, or `description`, a text
`<region2>: ...` for each annotation.

    osprey-conversation   osprey_conversation.json             the regions are listed, then talked about
    osprey-short          osprey_short_form.json               the same, in single words and short phrases
    osprey-part           osprey_part_level.json               the same, about parts of things
    osprey-posneg         osprey_lvis_positive_negative.json   is it this or that? the mark stands in the question
    osprey-detail         osprey_detail_description.json       a description of each region
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenpacker.data.annotations import wording
from tokenpacker.data.annotations.entries import read_list
from tokenpacker.data.annotations.reader import (
    Row,
    Rows,
    Source,
    Turn,
    entry_rows,
    file_names,
    make_row,
    plain_text,
    size_of,
)
from tokenpacker.data.annotations.region_specs import KIND, Spec, segmentation_spec
from tokenpacker.data.labels import check_conversation
from tokenpacker.data.rows import RecordError
from tokenpacker.hf.processing.llama_tokenizer import REGION_TOKEN

_REGION = re.compile(r"<region\s*(\d+)>", re.IGNORECASE)
_DESCRIPTION = re.compile(r"\s*<?region\s*(\d+)>?\s*:\s*(.+)", re.IGNORECASE | re.DOTALL)
Entry = Mapping[str, Any]
Asked = tuple[list[Turn], list[Spec]]  # turns, and the region of each `<mask>` in them
Ask = Callable[[str, Entry, Sequence[Spec]], Asked]


def read_conversations(source: Source, form: str = "") -> Rows:
    """A row for each conversation: its regions are listed in front of it.

    Args:
        form: the form of the answers, said after each question.
    """

    def ask(id: str, entry: Entry, specs: Sequence[Spec]) -> Asked:
        introduction = wording.list_regions(len(specs), source.chance(id))
        turns = []
        for place, (question, answer) in enumerate(_turns(id, entry)):
            question = f"{_numbered(id, question, len(specs))} {form}".strip()
            turns.append((question if place else f"{introduction} {question}", _numbered(id, answer, len(specs))))
        return turns, list(specs)

    yield from _rows(source, ask)


def read_positive_negative(source: Source) -> Rows:
    """A row for each conversation: a region is shown wherever a question names it, several times if need be."""

    def ask(id: str, entry: Entry, specs: Sequence[Spec]) -> Asked:
        turns, shown = [], []
        for question, answer in _turns(id, entry):
            if _REGION.search(answer):
                answer = _numbered(id, answer, len(specs))
            shown += [specs[number - 1] for number in _numbers(id, question, len(specs))]
            turns.append((_REGION.sub(REGION_TOKEN, question), answer))
        return turns, shown

    yield from _rows(source, ask)


def read_descriptions(source: Source) -> Rows:
    """A row for each image: regions chosen at random are described in turn."""

    def ask(id: str, entry: Entry, specs: Sequence[Spec]) -> Asked:
        chance = source.chance(id)
        described = _descriptions(id, entry, len(specs))
        chosen = source.chosen(list(described), chance)
        turns = [(wording.ask(wording.DETAIL, chance), described[number]) for number in chosen]
        return turns, [specs[number - 1] for number in chosen]

    yield from _rows(source, ask, any_number=True)


def _rows(source: Source, ask: Ask, any_number: bool = False) -> Rows:
    """A row for each entry; unless `any_number` is set, its texts need all regions, at most `max_regions`."""

    def make(id: str, entry: Any) -> Row:
        annotations = entry.get("annotation") if isinstance(entry, Mapping) else None
        if not isinstance(annotations, list):
            raise RecordError(id, "the entry has no list 'annotation'")
        if len(annotations) > source.max_regions and not any_number:
            reason = f"the entry has {len(annotations)} regions, more than max_regions={source.max_regions}"
            raise RecordError(id, f"{reason}; raise --max-regions", "too many regions")
        if not annotations or not all(isinstance(annotation, Mapping) for annotation in annotations):
            raise RecordError(id, "'annotation' holds no regions, or one that is no object", KIND)
        size = size_of(entry)
        specs = [segmentation_spec(f"{id}, region {n}", region, size) for n, region in enumerate(annotations, 1)]
        turns, shown = ask(id, entry, specs)
        return make_row(id, source.image(id, *file_names(entry), size=size), turns, shown)

    yield from entry_rows(((f"entry {n}", entry) for n, entry in enumerate(read_list(source.annotations), 1)), make)


def _turns(id: str, entry: Entry) -> list[Turn]:
    """Questions with their answers; a question at the end without an answer is left out, as the original did."""
    try:
        messages = check_conversation(entry.get("conversations") or [])
    except ValueError as error:
        raise RecordError(id, str(error), "malformed conversation") from None
    texts = [plain_text(id, message["value"], "a message") for message in messages]
    return list(zip(texts[::2], texts[1::2], strict=False))


def _numbered(id: str, text: str, num_regions: int) -> str:
    """The text with `region 2` for `<region2>`."""
    _numbers(id, text, num_regions)
    return _REGION.sub(r"region \1", text)


def _numbers(id: str, text: str, num_regions: int) -> list[int]:
    """The regions that a text names. Raises RecordError for one that does not exist."""
    numbers = [int(number) for number in _REGION.findall(text)]
    for number in numbers:
        if not 1 <= number <= num_regions:
            raise RecordError(id, f"a text names region {number} of {num_regions}", "regions and marks differ")
    return numbers


def _descriptions(id: str, entry: Entry, num_regions: int) -> dict[int, str]:
    """The description of each region that has one, by number."""
    texts = entry.get("description")
    if not isinstance(texts, list):
        raise RecordError(id, "the entry has no list 'description'")
    found = {}
    for text in texts:
        match = _DESCRIPTION.fullmatch(text) if isinstance(text, str) else None
        if match is None or not 1 <= int(match[1]) <= num_regions:
            raise RecordError(id, f"description {str(text)[:60]!r} does not begin with one of the regions")
        found[int(match[1])] = _numbered(id, plain_text(id, match[2], "a description"), num_regions)
    return found
