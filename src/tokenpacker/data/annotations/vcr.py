"""Visual Commonsense Reasoning: a question about people and things in a film still, an answer, and the reason for it.

Source: the readme of VCR 1.0 (Zellers et al., 2019). A line of `train.jsonl` has `objects` (names), `img_fn`,
`metadata_fn`, `question`, and the right one of `answer_choices` and `rationale_choices`: lists of words in which a list
of numbers stands for objects. The metadata, a JSON file beside each image, has `segms` (for each object polygons of
[x, y] points), `boxes` ([x0, y0, x1, y1, score]), `width` and `height`.

Objects that no sentence names are listed among the others: else the list would give the answer away.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenpacker.data.annotations import wording
from tokenpacker.data.annotations.coco import size_of
from tokenpacker.data.annotations.entries import read_entries, read_lines
from tokenpacker.data.annotations.reader import Row, Rows, Size, Source, make_row, plain_text
from tokenpacker.data.annotations.region_specs import Spec, box_spec, polygon_spec
from tokenpacker.data.rows import RecordError

# Words as VCR splits them, put together again: no space before these, and none after those.
_APOSTROPHE = re.compile(r" ?' ?(s|t|m|d|re|ve|ll)\b")
_CLOSING = re.compile(r" (?=[.,!?;:)\]%]|n't\b)|(?<=[(\[$#]) ")


def read_vcr(source: Source) -> Rows:
    """A row for each question: the objects are listed, then asked about, then the reason is asked for."""
    for number, line in enumerate(read_lines(source.annotations), 1):
        if isinstance(line, RecordError):
            yield line
            continue
        id = f"line {number}"
        try:
            if not isinstance(line, Mapping):
                raise RecordError(id, f"the line is a {type(line).__name__}, no object")
            id = str(line.get("annot_id", id))
            yield _row(source, id, line)
        except RecordError as error:
            yield error


def _row(source: Source, id: str, line: Mapping[str, Any]) -> Row:
    objects = line.get("objects")
    if not isinstance(objects, list) or not objects:
        raise RecordError(id, "'objects' is no list of names")
    sentences = [line.get("question"), _right(id, line, "answer"), _right(id, line, "rationale")]
    named = _named(id, sentences, len(objects))
    if len(named) > source.max_regions:
        reason = f"{len(named)} objects are named, more than max_regions={source.max_regions}; raise --max-regions"
        raise RecordError(id, reason, "too many regions")
    chance = source.chance(id)
    others = [place for place in range(len(objects)) if place not in named]
    listed = sorted([*named, *source.chosen(others, chance)[: source.max_regions - len(named)]])
    numbers = {place: number for number, place in enumerate(listed, 1)}
    question, answer, reason = (plain_text(id, _text(words, numbers), "a sentence") for words in sentences)
    introduction = wording.list_regions(len(listed), chance)
    turns = [(f"{introduction} {question}", answer), (chance.choice(wording.WHY), reason)]
    shapes, size = _shapes(source, id, line, len(objects))
    return make_row(
        id, source.image(id, str(line.get("img_fn")), size=size), turns, [shapes(place) for place in listed]
    )


def _right(id: str, line: Mapping[str, Any], what: str) -> Any:
    """The words of the right choice. Raises RecordError in test files, which hold none."""
    choices, label = line.get(f"{what}_choices"), line.get(f"{what}_label")
    if not isinstance(choices, list) or type(label) is not int or not 0 <= label < len(choices):
        raise RecordError(id, f"{what}_label={label!r} names none of the {what}_choices; use train.jsonl or val.jsonl")
    return choices[label]


def _named(id: str, sentences: Sequence[Any], num_objects: int) -> set[int]:
    """The objects that the sentences name. Raises RecordError for words of another form."""
    if not all(isinstance(words, list) and all(isinstance(word, (str, list)) for word in words) for words in sentences):
        raise RecordError(id, "a sentence is no list of words and lists of object numbers")
    places = [place for words in sentences for word in words if isinstance(word, list) for place in word]
    if not all(type(place) is int and 0 <= place < num_objects for place in places):
        raise RecordError(id, f"a sentence names an object that is none of the {num_objects} listed")
    return set(places)


def _text(words: Sequence[Any], numbers: Mapping[int, int]) -> str:
    """The sentence, with `region 2` for an object and `region 2 and region 3` for several."""
    parts = []
    for word in words:
        if isinstance(word, str):
            parts.append(word)
            continue
        regions = [f"region {numbers[place]}" for place in word]
        parts.append(" and ".join(filter(None, [", ".join(regions[:-1]), *regions[-1:]])))
    return _CLOSING.sub("", _APOSTROPHE.sub(r"'\1", " ".join(parts)))


def _shapes(source: Source, id: str, line: Mapping[str, Any], num_objects: int) -> tuple[Any, Size | None]:
    """The function that gives an object's region, its polygons, or its box where it has none; and the image's size."""
    path = source.find(id, str(line.get("metadata_fn")))
    try:
        boxes, shapes, size = _metadata(path)
    except ValueError as error:
        raise RecordError(id, str(error), "malformed region") from None
    if min(len(boxes), len(shapes)) < num_objects:
        reason = f"the metadata has {len(boxes)} boxes and {len(shapes)} segms for {num_objects} objects"
        raise RecordError(id, reason, "malformed region")

    def shape(place: int) -> Spec:
        name = f"{id}, object {place}"
        try:
            parts = [[number for point in polygon for number in point] for polygon in shapes[place]]
        except TypeError:
            raise RecordError(name, "its segms are no polygons of [x, y] points", "malformed region") from None
        spec = polygon_spec(name, parts)
        return box_spec(name, boxes[place][:4]) if spec is None else spec

    return shape, size


@lru_cache(maxsize=8)  # the questions about an image follow each other
def _metadata(path: Path) -> tuple[list[Any], list[Any], Size | None]:
    """Boxes and polygons of an image's objects, and its size. Raises ValueError for another form."""
    content: dict[str, list[Any]] = {"boxes": [], "segms": []}
    single = {}
    for key, entry in read_entries(path):
        if key in content:
            content[key].append(entry)
        else:
            single[key] = entry
    if not all(isinstance(entry, list) for entries in content.values() for entry in entries):
        raise ValueError(f"{path.name} has other 'boxes' or 'segms' than lists")
    return content["boxes"], content["segms"], size_of(single)
