"""Asks a model questions about images, in batches, and always takes the most likely token.

Questions about the same images share the prompt up to the end of the last image. Images are encoded once, this prefix
is computed once, and `generate` gets its key/value cache for each question: the same answers as one `generate` per
question, in less time. A region's token is computed once, too, for all questions that point at it.

Shapes: N groups of a batch, P tokens up to the end of the last image, Q questions, S text tokens.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, ProcessorMixin

from tokenpacker.evaluate.bench_question import StoredImage
from tokenpacker.hf.outputs import ImageFeatures
from tokenpacker.hf.processing.prompts import ImageTokens, encode_prompts
from tokenpacker.hf.versions import CACHE
from tokenpacker.images import ImageError, ImageSource, image_size, load_image
from tokenpacker.router import AUTO, ScaleFactor
from tokenpacker.sequence import ImageLayout

MAX_BATCH_TOKENS = 32_768  # of prompts and answers at once: 16 GiB of keys and values in a 7B model of 16 bits
TEXT_STEP = 256  # characters; texts of about the same length are answered together
CHARACTERS = 4  # of a token, about


@dataclass(frozen=True, kw_only=True)
class ImageGroup:
    """Questions about the same images.

    Args:
        images: stand before the text, in order. Files and stored images are opened when they are asked about.
        texts: of the user's turns.
        regions: of the image, which is the only one then.
        marked: for each text, the index among `regions` of each of its `<mask>`; empty without regions.
        of: what the caller asks about.
    """

    images: tuple[ImageSource | StoredImage, ...]
    texts: tuple[str, ...]
    regions: tuple[Any, ...] = ()
    marked: tuple[tuple[int, ...], ...] = ()
    of: Any = None


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The answer to a question.

    Args:
        image_tokens: of all images of the question, separators included.
        prompt_tokens: of the whole prompt, with the image tokens.
        answer_tokens: without the end of the answer.
    """

    text: str
    image_tokens: int
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class PreparedGroups:
    """Groups whose images have equally many tokens, and their questions as token ids.

    Args:
        prefix: (N, P) ids that all prompts of a group share, up to the end of the last image.
        tails: ids after the prefix, one list for each of the Q questions.
        images: what `get_image_features` takes; empty without images.
        owners: the group of each question.
        pointed_at: the place among the regions of all groups of each `<mask>` of all questions.
        image_tokens: of the images of a group.
    """

    prefix: Tensor
    tails: list[list[int]]
    images: dict[str, Tensor]
    owners: list[int]
    pointed_at: list[list[int]]
    image_tokens: int


@dataclass(frozen=True)
class _Opened:
    """A group whose images are tiles."""

    group: ImageGroup
    layouts: list[ImageLayout]
    sizes: list[tuple[int, int]]
    inputs: dict[str, Tensor]


class Asker:
    """Asks a model questions about images at one scale factor and budget."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        *,
        scale_factor: ScaleFactor | None = None,
        max_image_tokens: int | None = None,
    ):
        self.model, self.processor = model.eval(), processor
        self.image_token_id: int = model.config.image_token_id
        self.options: dict[str, Any] = {"scale_factor": scale_factor, "max_image_tokens": max_image_tokens}

    def layout(self, image: ImageSource) -> ImageLayout:
        """The tiles and tokens of an image, by its header alone unless the router must see its pixels."""
        if self.options["scale_factor"] == AUTO:
            return self.processor.plan_image(image, **self.options).layout
        return self.processor.image_layout(image_size(image), **self.options)

    def batches(self, groups: Iterable[ImageGroup], batch_size: int, max_new_tokens: int) -> Iterator[list[ImageGroup]]:
        """Groups that are answered together: of equally many image tokens and texts of about the same length.

        Only the last have fewer than `batch_size` questions, or those that would have more than `MAX_BATCH_TOKENS`.
        """
        waiting: dict[tuple[int, ...], list[ImageGroup]] = defaultdict(list)
        for group in groups:
            tokens, longest = self._num_tokens(group), max(map(len, group.texts)) // TEXT_STEP
            key = (len(group.images), tokens, longest)
            waiting[key].append(group)
            questions = sum(len(member.texts) for member in waiting[key])
            text_tokens = (longest + 1) * TEXT_STEP // CHARACTERS
            room = MAX_BATCH_TOKENS // (tokens + text_tokens + max_new_tokens)
            if questions >= min(batch_size, room):
                yield waiting.pop(key)
        yield from waiting.values()

    def prepare(self, groups: Sequence[ImageGroup]) -> PreparedGroups:
        """Processes the images, which must have equally many tokens in each group, and tokenizes all questions.

        Raises:
            ImageError: for an image that cannot be read.
        """
        return self._together([self._open(group) for group in groups])

    @torch.inference_mode()
    def answer(
        self, groups: Sequence[ImageGroup], max_new_tokens: int
    ) -> list[tuple[Reply | ValueError, ...] | ImageError]:
        """For each group the answers to its questions, in order, or why its images cannot be read.

        A question that is too long for the model has the reason in place of its answer.

        The images of each group must have equally many tokens.
        """
        opened = [self._try_to_open(group) for group in groups]
        ready = [each for each in opened if isinstance(each, _Opened)]
        replies = iter(self._replies(self._together(ready), max_new_tokens) if ready else ())
        return [
            each if isinstance(each, ImageError) else tuple(next(replies) for _ in each.group.texts) for each in opened
        ]

    def generate(self, **inputs: Any) -> Tensor:
        """Greedy answers with their prompts, as `model.generate`."""
        return self.model.generate(do_sample=False, num_beams=1, pad_token_id=self.pad_token_id, **inputs)

    @property
    def pad_token_id(self) -> int:
        """The id that fills short rows; any id would do, as it is masked."""
        tokenizer = self.processor.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def _num_tokens(self, group: ImageGroup) -> int:
        """Tokens of a group's images, by their headers; 0 if one cannot be read, of which `answer` says why."""
        try:
            return sum(self.layout(_source(image)).num_tokens for image in group.images)
        except ImageError:
            return 0

    def _open(self, group: ImageGroup) -> _Opened:
        pictures: list[Image.Image] = [load_image(_source(image)) for image in group.images]
        sizes = [(picture.height, picture.width) for picture in pictures]
        plain = self._prompt(".", len(pictures))  # without a marker for a mask, whose mask the processor would ask for
        inputs = self.processor(
            images=[pictures] if pictures else None, text=[plain], return_tensors="pt", **self.options
        )
        return _Opened(group, [self.layout(picture) for picture in pictures], sizes, dict(inputs))

    def _try_to_open(self, group: ImageGroup) -> _Opened | ImageError:
        try:
            return self._open(group)
        except ImageError as error:
            return error

    def _together(self, opened: Sequence[_Opened]) -> PreparedGroups:
        num_images, image_tokens = len(opened[0].layouts), sum(layout.num_tokens for layout in opened[0].layouts)
        groups, mark, device = [each.group for each in opened], self.image_token_id, self.model.device
        texts = [self._prompt(text, num_images) for group in groups for text in group.texts]
        shown = [[ImageTokens([mark], [""])] * num_images] * len(texts)  # the mark stays
        rows = encode_prompts(self.processor.tokenizer, texts, shown, mark, {"padding": False})["input_ids"]
        start, end = 0, 0
        if num_images:
            row = opened[0].inputs["input_ids"][0].tolist()
            marks = [place for place, token in enumerate(rows[0]) if token == mark]
            start = marks[-1] + 1  # of the text, where each image is one mark
            end = start + image_tokens - num_images
            assert row[:end].count(mark) == row.count(mark), "an image stands behind the text"
        names = ("pixel_values", "scale_factors") if num_images else ()
        images = {name: torch.cat([each.inputs[name] for each in opened]) for name in names if name in opened[0].inputs}
        if any(group.regions for group in groups):
            regions = [list(group.regions) for group in groups]
            grids = [each.layouts[0].tile_grid for each in opened]
            images |= self.processor.region_inputs(regions, [each.sizes[0] for each in opened], grids)
        firsts = [sum(len(group.regions) for group in groups[:index]) for index in range(len(groups))]
        return PreparedGroups(
            prefix=torch.cat([each.inputs["input_ids"][:, :end] for each in opened]).to(device),
            tails=[row[start:] for row in rows],
            images={name: tensor.to(device) for name, tensor in images.items()},
            owners=[index for index, group in enumerate(groups) for _ in group.texts],
            pointed_at=[
                [first + place for place in places]
                for first, group in zip(firsts, groups, strict=True)
                for places in (group.marked or [()] * len(group.texts))
            ],
            image_tokens=image_tokens,
        )

    def _replies(self, prepared: PreparedGroups, max_new_tokens: int) -> Iterator[Reply | ValueError]:
        lengths = [prepared.prefix.shape[1] + len(tail) for tail in prepared.tails]
        most = getattr(self.model.config.text_config, "max_position_embeddings", None) or max(lengths) + 1
        fitting = [place for place, length in enumerate(lengths) if length < most]
        answered = iter(self._answered(prepared, fitting, max_new_tokens) if fitting else ())
        for length in lengths:
            too_long = f"the prompt has {length:,} tokens but the model reads fewer than {most:,}; shorten it"
            yield next(answered) if length < most else ValueError(too_long)

    def _answered(self, prepared: PreparedGroups, places: Sequence[int], max_new_tokens: int) -> Iterator[Reply]:
        features = cache = None
        if prepared.images:
            features = self.model.get_image_features(**prepared.images)
            shown = {"image": ImageFeatures(pooler_output=features.pooler_output)}
            cache = self.model(input_ids=prepared.prefix, mm_encoder_outputs=shown, use_cache=True, logits_to_keep=1)[
                CACHE
            ]
        longest = prepared.prefix.shape[1] + max(len(prepared.tails[place]) for place in places) + max_new_tokens
        step = max(1, MAX_BATCH_TOKENS // longest)
        for start in range(0, len(places), step):
            asked = places[start : start + step]
            own = cache if start + step >= len(places) else copy.deepcopy(cache)
            regions = None if features is None else features.region_tokens
            output = self._generate(prepared, asked, own, regions, max_new_tokens)
            texts = self.processor.tokenizer.batch_decode(output, skip_special_tokens=True)
            for place, text, ids in zip(asked, texts, output.tolist(), strict=True):
                yield Reply(
                    text=text.strip(),
                    image_tokens=prepared.image_tokens,
                    prompt_tokens=prepared.prefix.shape[1] + len(prepared.tails[place]),
                    answer_tokens=next((count for count, token in enumerate(ids) if token in self._ends), len(ids)),
                )

    def _generate(
        self, prepared: PreparedGroups, asked: Sequence[int], cache: Any, regions: Tensor | None, max_new_tokens: int
    ) -> Tensor:
        """The answers' tokens to some of the questions. The cache, which holds the N prefixes, is used up."""
        device = self.model.device
        owners = torch.tensor([prepared.owners[place] for place in asked], device=device)
        prefix = prepared.prefix[owners]
        rows = [torch.tensor(prepared.tails[place], device=device) for place in asked]
        tails, mask = (
            pad_sequence(padded, batch_first=True, padding_value=value, padding_side="left")  # (Q, S)
            for padded, value in ((rows, self.pad_token_id), ([torch.ones_like(row) for row in rows], 0))
        )
        more: dict[str, Any] = {}
        if cache is not None:
            cache.batch_select_indices(owners)  # N prefixes -> Q, one for each question
            more = {CACHE: cache, "mm_encoder_outputs": {}}  # the images themselves are in the cache
        if regions is not None:
            places = [index for place in asked for index in prepared.pointed_at[place]]
            pointed_at = torch.tensor(places, device=device, dtype=torch.int64)
            more["mm_encoder_outputs"] = {"image": ImageFeatures(region_tokens=regions[pointed_at])}
        input_ids = torch.cat([prefix, tails], dim=1)  # (Q, P + S)
        # Padding is between image and question; position ids count the mask's ones, so they continue across it.
        attention_mask = torch.cat([torch.ones_like(prefix), mask], dim=1)
        output = self.generate(
            input_ids=input_ids, attention_mask=attention_mask, max_new_tokens=max_new_tokens, **more
        )
        return output[:, input_ids.shape[1] :]

    @property
    def _ends(self) -> set[int]:
        """Ids that end an answer."""
        ends = self.model.generation_config.eos_token_id
        return {self.processor.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}

    def _prompt(self, text: str, num_images: int = 1) -> str:
        content: list[dict[str, Any]] = [*[{"type": "image"}] * num_images, {"type": "text", "text": text}]
        conversation = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)


def _source(image: ImageSource | StoredImage) -> ImageSource:
    return image.read() if isinstance(image, StoredImage) else image
