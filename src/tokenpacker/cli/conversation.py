"""A conversation with a model: history, streaming, counts and times. Only commands that load a model import it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from transformers import TextStreamer

from tokenpacker.cli.region_arguments import Region
from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor
from tokenpacker.hf.processing.llama_tokenizer import REGION_TOKEN
from tokenpacker.visualize import PackedImage

PLACING = "write it once for each new image, or leave it out"
NO_REGIONS = "the model has not learned regions; choose one that has, such as --model tiny-regions"
MARKING = "mark each with --mask, --box or --polygon, in a chat with /mask, /box or /polygon"


@dataclass(frozen=True)
class Answer:
    """One answer and what it cost.

    Args:
        image_tokens: tokens of all images in the prompt, separators included.
        full_image_tokens: tokens of the same tiles at one token per patch.
        prompt_tokens: tokens of the whole prompt, images included.
        new_tokens: generated tokens, the end token included.
        first_token_ms: from the question to the first token: image preparation, vision, projector and prefill.
        interrupted: whether the user stopped the answer.
    """

    text: str
    image_tokens: int
    full_image_tokens: int
    prompt_tokens: int
    new_tokens: int
    first_token_ms: float
    total_ms: float
    interrupted: bool = False

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict; the text under `answer`."""
        values = asdict(self)
        return {"answer": values.pop("text"), **values}

    def summary(self) -> str:
        """The line below an answer."""
        saved = f" instead of {self.full_image_tokens} at one per patch" if self.image_tokens else ""
        return (
            f"{self.image_tokens} image tokens{saved}, {self.prompt_tokens} in the prompt;"
            f" first token after {self.first_token_ms:.0f} ms"
        )


class Conversation:
    """Messages, images and regions so far, and the model that continues them.

    Args:
        scale_factor: for every image; None takes the model's own.
        max_image_tokens: limit per image.
        max_new_tokens: limit per answer.
    """

    def __init__(
        self,
        model: TokenPackerForConditionalGeneration,
        processor: TokenPackerProcessor,
        *,
        scale_factor: int | None = None,
        max_image_tokens: int | None = None,
        max_new_tokens: int = 256,
    ):
        self.model, self.processor = model, processor
        self.plan: dict[str, Any] = {"scale_factor": scale_factor, "max_image_tokens": max_image_tokens}
        self.max_new_tokens = max_new_tokens
        self.clear()

    def clear(self) -> None:
        """Forgets all messages, images and regions."""
        self.messages: list[dict[str, Any]] = []
        self.images: list[PackedImage] = []
        self.regions: list[Region] = []  # in the order of their marks

    def pack(self, image: Image.Image) -> PackedImage:
        """Plans the tiles and tokens of an RGB image. Raises ValueError if it cannot meet the limits."""
        return PackedImage.plan(self.processor, image, **self.plan)

    def said(self) -> list[tuple[bool, str]]:
        """For each message, whether it is a question, and its text."""
        texts = ["".join(part.get("text", "") for part in message["content"]) for message in self.messages]
        return [(message["role"] == "user", text) for message, text in zip(self.messages, texts, strict=True)]

    def check_region(self, region: Region, image: PackedImage, number: int) -> None:
        """Raises ValueError for a region outside of what the model sees, and for a model without regions.

        Args:
            number: the region's place in its question, counted from 1, for the message.
        """
        if self.processor.region_token_id is None:
            raise ValueError(NO_REGIONS)
        try:
            size = (image.image.height, image.image.width)
            self.processor.region_inputs([[region.form]], [size], [image.layout.tile_grid])
        except ValueError as error:
            raise ValueError(str(error).replace("region 1 of image 1", f"region {number}", 1)) from None

    def ask(
        self,
        question: str,
        images: list[PackedImage],
        on_text: Callable[[str], None],
        regions: Sequence[Region] = (),
    ) -> Answer:
        """The model's greedy answer. The question and the answer join the history.

        Images stand before the question, unless it says `<image>` itself where each belongs. Ctrl-C stops the answer
        and keeps what was said so far; a question without any answer is dropped.

        Args:
            on_text: gets the answer piece by piece.
            regions: what each `<mask>` of the question stands for, in any of the images so far.

        Raises:
            ValueError: if the markers differ in number from the images or regions, or the prompt is too long.
        """
        start = time.perf_counter()
        self._check_marks(question, len(images), len(regions))
        marked = self.processor.image_token in question
        content = [{"type": "image"} for _ in images if not marked] + [{"type": "text", "text": question}]
        messages = [*self.messages, {"role": "user", "content": content}]
        all_images, all_regions = [*self.images, *images], [*self.regions, *regions]
        inputs = self._inputs(messages, all_images, all_regions)
        streamer = _AnswerStreamer(self.processor.tokenizer, on_text)
        interrupted = False
        try:
            self._generate(inputs, streamer)
        except KeyboardInterrupt:
            interrupted = True
            streamer.end()  # passes on the last word, which was held back until it is complete
        end = time.perf_counter()
        if streamer.text or not interrupted:
            reply = {"role": "assistant", "content": [{"type": "text", "text": streamer.text}]}
            self.messages, self.images, self.regions = [*messages, reply], all_images, all_regions
        return Answer(
            text=streamer.text,
            image_tokens=sum(packed.layout.num_tokens for packed in all_images),
            full_image_tokens=sum(packed.num_full_tokens for packed in all_images),
            prompt_tokens=inputs["input_ids"].shape[1],
            new_tokens=streamer.num_tokens,
            first_token_ms=round(1000 * ((streamer.first_token_at or end) - start), 1),
            total_ms=round(1000 * (end - start), 1),
            interrupted=interrupted,
        )

    def _check_marks(self, question: str, num_images: int, num_regions: int) -> None:
        """Raises ValueError if a question's markers differ in number from the images or regions that it comes with.

        The processor counts the markers of all questions together.
        """
        places = []
        if self.processor.image_token in question:
            places.append((self.processor.image_token, num_images, "images", PLACING))
        if self.processor.region_token_id is None:
            if REGION_TOKEN in question and num_images:
                raise ValueError(f"{NO_REGIONS}, or write the question without {REGION_TOKEN}")
        else:
            places.append((self.processor.region_token, num_regions, "regions", MARKING))
        for marker, count, what, remedy in places:
            written = question.count(marker)
            if written != count:
                rule = f"the question needs as many {marker} markers as {what}"
                raise ValueError(f"{rule}: {written} markers, {count} {what}; {remedy}")

    def _inputs(
        self, messages: list[dict[str, Any]], images: list[PackedImage], regions: list[Region]
    ) -> dict[str, Any]:
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        pictures = [[packed.image for packed in images]]
        masks = [[region.form for region in regions if region.image == number] for number in range(len(images))]
        inputs = self.processor(images=pictures, text=[prompt], region_masks=masks, return_tensors="pt", **self.plan)
        if regions:  # the processor orders regions by image; the prompt's markers are in the order of `regions`
            by_image = sorted(range(len(regions)), key=lambda place: regions[place].image)
            as_marked = torch.tensor(by_image).argsort()
            inputs |= {name: inputs[name][as_marked] for name in ("region_cells", "region_first_tile")}
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        length = inputs["input_ids"].shape[1]
        if limit is not None and length >= limit:
            raise ValueError(
                f"the prompt has {length} tokens but the model reads fewer than {limit}; use fewer images, a larger"
                " --scale-factor or a smaller --max-image-tokens, and /clear in a chat"
            )
        room = self.max_new_tokens if limit is None else min(self.max_new_tokens, limit - length)
        return {**inputs.to(self.model.device), "max_new_tokens": room}

    def _generate(self, inputs: dict[str, Any], streamer: TextStreamer) -> None:
        tokenizer = self.processor.tokenizer
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        with torch.inference_mode():
            self.model.generate(**inputs, do_sample=False, num_beams=1, pad_token_id=pad, streamer=streamer)


class _AnswerStreamer(TextStreamer):
    """Passes text on as soon as a word is complete, and notes when the first token came."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text
        self.text = ""
        self.num_tokens = 0
        self.first_token_at: float | None = None

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.first_token_at = self.first_token_at or time.perf_counter()
            self.num_tokens += 1
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text if self.text else text.lstrip()  # the prompt ends in "ASSISTANT:", the answer starts with a space
        self.text += text
        if text:
            self.on_text(text)
