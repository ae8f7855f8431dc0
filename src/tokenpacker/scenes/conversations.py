"""Many conversations about one image in one sequence, without any seeing another.

An image's tokens come once (the prefix); each conversation about it (a segment) attends to the prefix and to itself,
and its positions continue from the prefix. The result for every segment is exactly that of the prefix and the segment
alone, at a fraction of the cost: image tokens are most of a sequence.

Shapes: B images, S sequence length.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tokenpacker.scenes import Question
from tokenpacker.sequence import IGNORED


@dataclass(frozen=True)
class Segment:
    """Token ids of one conversation and, at each position, the id to be predicted there or IGNORED.

    `regions` are those that its questions point at, in order: places among the regions of its image.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    regions: tuple[int, ...] = ()


def make_segment(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Question]) -> Segment:
    """The conversation that follows an image: answers and end marks are learned, the rest is read.

    The first turn continues the user's message that the image opened.
    """
    ids: list[int] = []
    labels: list[int] = []
    for number, turn in enumerate(turns):
        asked = f"{'USER: ' if number else ''}{turn.text} ASSISTANT:"
        question = tokenizer(asked, add_special_tokens=False).input_ids
        answer = [*tokenizer(f" {turn.answer}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ids += question + answer
        labels += [IGNORED] * len(question) + answer
    return Segment(tuple(ids), tuple(labels), tuple(place for turn in turns for place in turn.regions))


def pack(prefixes: Sequence[Sequence[int]], segments: Sequence[Sequence[Segment]], pad_id: int) -> dict[str, Tensor]:
    """One batch: image `i` opens with `prefixes[i]`, and `segments[i]` are asked about it.

    Returns input_ids, labels and position_ids (B, S), and attention_mask (B, 1, S, S), 0 where position i may see
    position j and the lowest float elsewhere; padding is on the right.
    """
    length = max(
        len(prefix) + sum(len(part.input_ids) for part in parts)
        for prefix, parts in zip(prefixes, segments, strict=True)
    )
    size = (len(prefixes), length)
    input_ids = torch.full(size, pad_id)
    labels = torch.full(size, IGNORED)
    position_ids = torch.zeros(size, dtype=torch.int64)
    owner = torch.full(size, -1)  # 0 is the prefix, 1.. the segments, -1 padding
    for row, (prefix, parts) in enumerate(zip(prefixes, segments, strict=True)):
        start = len(prefix)
        input_ids[row, :start] = torch.tensor(prefix)
        position_ids[row, :start] = torch.arange(start)
        owner[row, :start] = 0
        for number, part in enumerate(parts, 1):
            stop = start + len(part.input_ids)
            input_ids[row, start:stop] = torch.tensor(part.input_ids)
            labels[row, start:stop] = torch.tensor(part.labels)
            position_ids[row, start:stop] = len(prefix) + torch.arange(stop - start)
            owner[row, start:stop] = number
            start = stop
    same = owner[:, :, None] == owner[:, None, :]
    seen = (same | (owner[:, None, :] == 0)) & torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(size[0], 1, length, length).masked_fill_(~seen[:, None], torch.finfo(torch.float32).min)
    return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids, "attention_mask": mask}
