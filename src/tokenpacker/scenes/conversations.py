"""Several conversations about one image in one sequence.

The image's tokens come once, as the prefix. Each conversation (a segment) attends to the prefix and to itself, and its
positions continue from the prefix. So the model computes for each segment what it would compute for the prefix and that
segment alone, at less cost: most tokens of a sequence are image tokens.

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
    """The token ids of one conversation.

    Args:
        labels: the id at each position that is learned, IGNORED at the others.
        regions: for each `<mask>` of the conversation, the index of its region among those of the image.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    regions: tuple[int, ...] = ()


def make_segment(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Question]) -> Segment:
    """The conversation that follows an image. Answers and their end marks are learned, questions are not.

    The first question continues the user's message, which the image has opened.
    """
    ids: list[int] = []
    labels: list[int] = []
    for number, turn in enumerate(turns):
        opening = "USER: " if number else ""
        question = tokenizer(f"{opening}{turn.text} ASSISTANT:", add_special_tokens=False).input_ids
        answer = [*tokenizer(f" {turn.answer}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ids += question + answer
        labels += [IGNORED] * len(question) + answer
    return Segment(tuple(ids), tuple(labels), tuple(place for turn in turns for place in turn.regions))


def pack(prefixes: Sequence[Sequence[int]], segments: Sequence[Sequence[Segment]], pad_id: int) -> dict[str, Tensor]:
    """One batch: row i is `prefixes[i]` and the `segments[i]` about it, padded on the right.

    Returns input_ids, labels and position_ids (B, S), and attention_mask (B, 1, S, S), which is 0 where a position may
    attend to another and the lowest float elsewhere.
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
