"""Visual Commonsense Reasoning: a question about people and things in a film still, an answer, and the reason for it.

Source: the readme of VCR 1.0 (Zellers et al., 2019). A line of `train.jsonl` has `objects` (names), `img_fn`,
`metadata_fn`, `question`, and the right one of `answer_choices` and `rationale_choices`: lists of words in which a list
of numbers stands for objects. The metadata, a JSON file beside each image, has `segms` (for each object polygons of
[x, y] points), `boxes` ([x0, y0, x1, y1, score]), `width` and `height`.

Objects that no sentence names are listed too, for otherwise the list would give the answer away.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenpacker.data.annotations.entries import read_entries, read_lines
from tokenpacker.data.annotations.reader import Row, Rows, Source, entry_rows, make_row, plain_text, size_of
from tokenpacker.data.annotations.region_specs import KIND, Size, Spec, box_spec, polygon_spec
from tokenpacker.data.annotations.wording import WHY, list_regions
from tokenpacker.data.rows import RecordError

# VCR splits sentences into words. They are joined again without a space before or after these.
_APOSTROPHE = re.compile(r" ?' ?(s|t|m|d|re|ve|ll)\b")
_CLOSING = re.compile(r" (?=[.,!?;:)\]%]|n't\b)|(?<=[(\[$#]) ")


def read_vcr(source: Source) -> Rows:
    """A row for each question: the objects are listed, then asked about, then the reason is asked for."""
    entries = ((f"line {number}", line) for number, line in enumerate(read_lines(source.annotations), 1))
    yield from entry_rows(entries, lambda place, line: _row(source, place, line))


def _row(source: Source, place: str, line: Any) -> Row:
    if isinstance(line, RecordError):
        raise line
    if not isinstance(line, Mapping):
        raise RecordError(place, f"the line is a {type(line).__name__}, no object")
    id = str(line.get("annot_id", place))
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
    introduction = list_regions(len(listed), chance)
    turns = [(f"{introduction} {question}", answer), (chance.choice(WHY), reason)]
    metadata = source.find(id, str(line.get("metadata_fn")))
    try:
        boxes, shapes, size = _read_metadata(metadata)
    except ValueError as error:
        raise RecordError(id, str(error), KIND) from None
    if min(len(boxes), len(shapes)) < len(objects):
        reason = f"the metadata has {len(boxes)} boxes and {len(shapes)} segms for {len(objects)} objects"
        raise RecordError(id, reason, KIND)
    image = source.image(id, str(line.get("img_fn")), size=size)
    return make_row(id, image, turns, [_spec(f"{id}, object {at}", boxes[at], shapes[at]) for at in listed])


def _right(id: str, line: Mapping[str, Any], what: str) -> Any:
    """The words of the right choice. Raises RecordError for test files, which have none."""
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


@lru_cache(maxsize=8)  # questions about the same image follow each other
def _read_metadata(path: Path) -> tuple[list[Any], list[Any], Size | None]:
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


def _spec(id: str, box: list[Any], polygons: list[Any]) -> Spec:
    """The region of an object: its polygons of [x, y] points, or its box if it has none. Raises RecordError."""
    try:
        parts = [[number for point in polygon for number in point] for polygon in polygons]
    except TypeError:
        raise RecordError(id, "its segms are no polygons of [x, y] points", KIND) from None
    return polygon_spec(id, parts) or box_spec(id, box[:4])
