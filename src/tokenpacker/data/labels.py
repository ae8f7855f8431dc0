"""A LLaVA conversation to the token ids and labels that the released models were trained with.

    conversation -> merge_image_marks -> render_prompt -> prepare_example -> expand

A conversation is a list of `{"from": "human" | "gpt", "value": text}`. Only the answers are learned, each with its end
mark. Released weights need this: the original found the answers by encoding each round alone and adding up the lengths.
If the sum differs from the length of the whole conversation, nothing is learned from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from transformers import PreTrainedTokenizerBase

from tokenpacker.hf.processing.chat import chat_template
from tokenpacker.hf.processing.llama_tokenizer import IMAGE_TOKEN, encode_as_trained
from tokenpacker.sequence import IGNORED
from tokenpacker.text import check_text

Conversation = Sequence[Mapping[str, str]]
TrainingFormat = Literal["v1", "plain", "bare"]
HUMAN, GPT = "human", "gpt"
ROLES = {HUMAN: "user", GPT: "assistant"}
BEFORE_ANSWER = " ASSISTANT: "


@dataclass(frozen=True)
class Example:
    """Token ids of one conversation.

    Args:
        labels: at each position the id that is learned there, or IGNORED.
        attention_mask: 0 at padding tokens. The original took a literal `<unk>` for one.
        problem: why nothing is learned; None if something is.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    attention_mask: tuple[int, ...]
    problem: str | None = None


def merge_image_marks(conversation: Conversation, *, image_start_end: bool = False) -> list[dict[str, str]]:
    """The conversation with the image marks of each message merged into one, on a line before the text.

    Args:
        image_start_end: write `<im_start><image><im_end>`, for models trained with `mm_use_im_start_end`.
    """
    mark = f"<im_start>{IMAGE_TOKEN}<im_end>" if image_start_end else IMAGE_TOKEN
    merged = []
    for message in check_conversation(conversation):
        text = message["value"]
        if IMAGE_TOKEN in text:
            text = f"{mark}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip()
        merged.append({**message, "value": text})
    return merged


def render_prompt(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, format: TrainingFormat = "v1") -> str:
    """The text that is tokenized, with its start token, as the chat template writes it.

    Released weights need this: a v1 conversation that begins with the model loses its first message, and a question in
    the plain format keeps only its image mark.

    Raises:
        ValueError: if the conversation is malformed, with the number of the message.
    """
    messages = check_conversation(conversation)
    if format == "plain":
        messages = _check_caption(messages)
    elif format in ("v1", "bare"):
        first = int(messages[0]["from"] != HUMAN)
        messages = messages[first:]
        _check_order(messages, first)
    else:
        raise ValueError(f"format={format!r} has no labels; use 'v1', 'bare' or 'plain'")
    chat = [{"role": ROLES[message["from"]], "content": message["value"]} for message in messages]
    rendered = tokenizer.apply_chat_template(chat, chat_template=chat_template(format=format), tokenize=False)
    return str(rendered)


def prepare_example(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    *,
    has_image: bool,
    format: TrainingFormat = "v1",
    max_length: int | None = None,
    image_start_end: bool = False,
    merge_marks: bool = True,
) -> Example:
    """Ids and labels of a conversation. Each image is still one mark.

    Args:
        has_image: whether an image belongs to the conversation. Without one, a literal `<image>` is ordinary text.
        format: `v1` for conversations, `bare` for conversations without a system text, `plain` for captions (a question
            with the image, and an answer).
        max_length: longest conversation without an image; the rest of a longer one is cut off. None takes the
            tokenizer's `model_max_length`.
        merge_marks: merge the marks of a message, see `merge_image_marks`; False leaves every mark in its place, for
            samples with several images.

    Raises:
        ValueError: if the conversation is malformed, as in `render_prompt`.
    """
    max_length = tokenizer.model_max_length if max_length is None else max_length
    if has_image and merge_marks:
        conversation = merge_image_marks(conversation, image_start_end=image_start_end)
    marks = has_image or format == "plain"
    prompt = render_prompt(conversation, tokenizer, format).removeprefix(tokenizer.bos_token or "")
    ids = _encode(tokenizer, prompt, marks)
    if not marks:
        ids = ids[:max_length]
    problem = None
    if format == "plain":
        read = len(_encode(tokenizer, IMAGE_TOKEN, marks))
        labels = [IGNORED] * read + ids[read:]
    else:
        labels, problem = _answer_labels(ids, prompt, tokenizer, marks, max_length)
    pad_token_id = tokenizer.pad_token_id  # looking it up is slow
    mask = tuple(int(token != pad_token_id) for token in ids)
    return Example(tuple(ids), tuple(labels), mask, problem)


def expand(example: Example, image_token_id: int, image_ids: Sequence[Sequence[int]]) -> Example:
    """The example with each image mark replaced by its image's token ids, of which none is learned.

    Args:
        image_ids: for each image what `ImageLayout.token_ids` gives, in the order of the marks.

    Raises:
        ValueError: when marks and images differ in number, as after a cut at `max_length`.
    """
    num_marks = example.input_ids.count(image_token_id)
    if num_marks != len(image_ids):
        raise ValueError(
            f"image_ids has {len(image_ids)} images for {num_marks} marks; pass one entry for each mark, and leave "
            "out examples that were cut before their image"
        )
    images = iter(image_ids)
    ids: list[int] = []
    labels: list[int] = []
    mask: list[int] = []
    for token, label, seen in zip(example.input_ids, example.labels, example.attention_mask, strict=True):
        image = next(images) if token == image_token_id else None
        ids += [token] if image is None else image
        labels += [label] if image is None else [IGNORED] * len(image)
        mask += [seen] if image is None else [1] * len(image)
    return replace(example, input_ids=tuple(ids), labels=tuple(labels), attention_mask=tuple(mask))


def check_conversation(conversation: Conversation) -> list[dict[str, str]]:
    """The messages of a conversation, each with a known role and a text.

    Raises:
        ValueError: if it is no such list; names the message, counted from 1.
    """
    if not isinstance(conversation, Sequence) or isinstance(conversation, str) or not conversation:
        raise ValueError(f"conversation={conversation!r} must be a list of at least one message")
    for number, message in enumerate(conversation, 1):
        if not isinstance(message, Mapping) or not {"from", "value"} <= message.keys():
            raise ValueError(f"message {number} must be a dict with the keys 'from' and 'value', not {message!r}")
        if not isinstance(message["from"], str) or message["from"] not in ROLES:
            raise ValueError(f"message {number} is from {message['from']!r}; use {' or '.join(map(repr, ROLES))}")
        check_text(message["value"], f"the value of message {number}")
    return [dict(message) for message in conversation]


def _check_order(messages: Sequence[Mapping[str, str]], num_dropped: int) -> None:
    if not messages:
        raise ValueError("the conversation has no message from 'human'; begin with one")
    for place, message in enumerate(messages):
        expected = (HUMAN, GPT)[place % 2]
        if message["from"] != expected:
            number = place + num_dropped + 1
            raise ValueError(
                f"message {number} is from {message['from']!r}, where {expected!r} is due; let the two take turns"
            )


def _check_caption(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Image mark and caption."""
    if len(messages) != 2:
        raise ValueError(f"the plain format needs 2 messages, not {len(messages)}; use format='v1' for conversations")
    if IMAGE_TOKEN not in messages[0]["value"]:
        raise ValueError(f"message 1 of the plain format has no {IMAGE_TOKEN}; write it where the image belongs")
    return [{"from": HUMAN, "value": IMAGE_TOKEN}, {"from": GPT, "value": messages[1]["value"]}]


def _answer_labels(
    ids: Sequence[int], prompt: str, tokenizer: PreTrainedTokenizerBase, marks: bool, max_length: int
) -> tuple[list[int], str | None]:
    """Labels of the answers, IGNORED elsewhere; and why nothing is learned, or None.

    The length of a round includes its end mark, not the start token, which the whole conversation has once.
    """
    labels = list(ids)
    labels[0] = IGNORED
    position = 0 if tokenizer.bos_token is None else 1
    for text in prompt.split(str(tokenizer.eos_token)):
        parts = text.split(BEFORE_ANSWER)
        if len(parts) != 2:
            break
        # Without the last space, which belongs to the answer's first token.
        read = len(encode_as_trained(tokenizer, parts[0] + BEFORE_ANSWER, image_marks=marks)) - 1
        labels[position : position + read] = [IGNORED] * len(labels[position : position + read])
        position += len(encode_as_trained(tokenizer, text, image_marks=marks)) + 1
    labels[position:] = [IGNORED] * len(labels[position:])
    pad_token_id = tokenizer.pad_token_id  # looking it up is slow
    total = sum(token != pad_token_id for token in ids)
    if position >= max_length or position == total:
        return labels, None
    problem = (
        f"the rounds have {position} tokens and the conversation {total}, so nothing is learned from it; write no "
        f"empty message, and no {BEFORE_ANSWER!r}, {tokenizer.eos_token!r} or {tokenizer.pad_token!r} in a message"
    )
    return [IGNORED] * len(ids), problem


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, image_marks: bool) -> list[int]:
    """Ids, after the start token if the tokenizer has one."""
    ids = encode_as_trained(tokenizer, text, image_marks=image_marks)
    return ids if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *ids]
