"""The model under lmms-eval: `lmms-eval --model tokenpacker --model_args pretrained=DIR,scale_factor=3 --tasks ...`.

lmms-eval 0.7.3 gives a chat class messages, and knows no log-likelihood for it. Tasks of several choices that compare
likelihoods need `--force_simple`, which takes the second class here. Prompts are the same.

Shapes: B requests of a batch, S tokens of the longest prompt, K tokens of the longest answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import Collator
from loguru import logger
from torch import Tensor
from tqdm import tqdm
from transformers import BatchFeature, GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria

from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor
from tokenpacker.hf.processing.keywords import check_names
from tokenpacker.hf.processing.placeholders import count_marks
from tokenpacker.hf.processing.prompts import ImageTokens, encode_prompts
from tokenpacker.hub import is_released, resolve
from tokenpacker.router import ScaleFactor

OPTIONS = ("pretrained", "scale_factor", "max_image_tokens", "dtype", "device", "batch_size")
MAX_NEW_TOKENS = 1024  # of a task that sets no limit, as for lmms-eval's LLaVA
OF_OTHER_MODELS = ("image_aspect_ratio",)  # tasks carry this option of LLaVA's; the others that they carry are standard
Messages = list[dict[str, Any]]


class TokenPackerChat(lmms):
    """A model for tasks that are answered with text.

    Args:
        pretrained: folder, name of a carried model, or hub id.
        scale_factor: for every image; "auto" for each tile by its detail, None for the model's own.
        max_image_tokens: budget of tokens per image, separators included; None sets no limit.
        dtype: of the weights; "auto" takes them as stored.
        device: where the weights go; "auto" spreads them over all GPUs; None takes the process's own device.
        batch_size: requests that are answered at once.

    Raises:
        ValueError: for an unknown option, one that the model cannot take, a device beside several processes, and
            missing weights.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "",
        scale_factor: ScaleFactor | None = None,
        max_image_tokens: int | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        **unknown: Any,
    ) -> None:
        super().__init__()
        check_names(unknown, OPTIONS, "--model tokenpacker")
        if not pretrained:
            raise ValueError("--model tokenpacker needs a model; give --model_args pretrained=DIR")
        folder = resolve(str(pretrained))
        if is_released(folder):
            raise ValueError(f"pretrained={pretrained} has the original layout; run `tokenpacker convert` on it first")
        if not str(batch_size).isdecimal() or not int(batch_size):
            raise ValueError(f"batch_size={batch_size} must be a whole number, at least 1")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if device is not None and self.world_size > 1:
            raise ValueError(
                f"device={device} was given to {self.world_size} processes, which have one each; leave it out"
            )
        self.batch_size = int(batch_size)
        self.processor = TokenPackerProcessor.from_pretrained(folder)
        self.image_options = {"scale_factor": scale_factor, "max_image_tokens": max_image_tokens}
        self.processor.check_plan(**self.image_options)  # refuses wrong options before the weights are read
        loaded, report = TokenPackerForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, device_map=str(device or self.accelerator.device), output_loading_info=True
        )
        if missing := sorted(report["missing_keys"]):  # transformers would fill them with random numbers and go on
            raise ValueError(
                f"pretrained={pretrained} lacks {len(missing)} weights, such as {missing[0]}; fetch it anew"
            )
        self.model = loaded.eval()
        self.device = loaded.device

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """The answer to each request, up to the first of its stop texts, with the number of tokens."""
        for request in requests:
            generation_options(self._settings(request.args))  # refuses wrong ones before any answer
        return self._in_batches(requests, self._settings, self._generate)

    @torch.inference_mode()
    def _generate(self, batch: Sequence[tuple]) -> Iterator[GenerationResult]:
        options, until = generation_options(self._settings(batch[0]))
        inputs, _ = self._inputs([self._messages(arguments) for arguments in batch])
        tokenizer, length = self.processor.tokenizer, inputs["input_ids"].shape[1]
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        stops = [StopTexts(tokenizer, until, length)] if until else []
        output = self.model.generate(**inputs, **options, pad_token_id=pad, stopping_criteria=stops)[:, length:]
        no_text = torch.tensor([pad, tokenizer.eos_token_id], device=output.device)
        texts = tokenizer.batch_decode(output, skip_special_tokens=True)
        for text, prompt, answer in zip(texts, inputs["attention_mask"], output, strict=True):
            ends = [place for place in map(text.find, until) if place >= 0]
            counts = TokenCounts(int(prompt.sum()), int((~torch.isin(answer, no_text)).sum()))
            yield GenerationResult(text[: min(ends, default=None)].strip(), counts)

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """For each request the loss of its answer, and whether the model would give that answer, as a pair in `text`.

        The loss is the mean over the answer's tokens, its end among them, as for lmms-eval's own models: the task takes
        the choice with the lowest. lmms-eval 0.7.3 would turn a bare pair into a string, which its tasks cannot read.
        """
        return self._in_batches(requests, lambda arguments: {}, self._compare)

    @torch.inference_mode()
    def _compare(self, batch: Sequence[tuple]) -> Iterator[GenerationResult]:
        asked = [self._messages_to_compare(arguments) for arguments in batch]
        inputs, counts = self._inputs([messages for messages, _ in asked], [answer for _, answer in asked])
        mask = inputs["attention_mask"]
        logits = self.model(
            **inputs,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),  # padding is on the left
            logits_to_keep=max(counts) + 1,
        ).logits  # (B, K + 1, V)
        for row, ids, count in zip(logits.float(), inputs["input_ids"], counts, strict=True):
            predicted, answer = row[-count - 1 : -1], ids[-count:]
            loss = torch.nn.functional.cross_entropy(predicted, answer)
            is_greedy = bool((predicted.argmax(dim=1) == answer).all())
            yield GenerationResult((float(loss), is_greedy))

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported."""
        raise NotImplementedError(
            "--model tokenpacker answers in one round; leave out tasks of the type generate_until_multi_round"
        )

    def _in_batches(self, requests: list[Instance], group: Any, answer: Any) -> list[Any]:
        """Answers in the order of the requests, which are grouped by what `group` gives and sorted by length."""
        collator = Collator(
            [request.args for request in requests], lambda arguments: -len(arguments[0]), group, grouping=True
        )
        answers: list[Any] = []
        with tqdm(total=len(requests), desc="Model Responding", disable=self.rank != 0) as progress:
            for batch in collator.get_batched(n=self.batch_size):
                answers += answer(batch)
                progress.update(len(batch))
        return collator.get_original(answers)

    def _settings(self, arguments: tuple) -> dict[str, Any]:
        return arguments[2]

    def _messages(self, arguments: tuple) -> Messages:
        _, doc_to_messages, _, doc_id, task, split = arguments
        return doc_to_messages(self.task_dict[task][split][doc_id])

    def _messages_to_compare(self, arguments: tuple) -> tuple[Messages, str]:
        """A question, and the answer whose likelihood is asked for."""
        if len(arguments) == 2:  # the answer alone, of which mutual information is computed
            return _user_turn(arguments[0], None), arguments[1]
        context, target, doc_to_visual, doc_id, task, split = arguments
        doc = self.task_dict[task][split][doc_id]
        return _user_turn(context, doc_to_visual(doc)), str(target(doc) if callable(target) else target)

    def _inputs(
        self, conversations: Sequence[Messages], answers: Sequence[str] | None = None
    ) -> tuple[BatchFeature, list[int]]:
        """Inputs of the model, padded on the left, and the number of tokens of each answer that ends a conversation."""
        read = [self._read(messages) for messages in conversations]
        images, template = [shown for _, shown in read], self.processor.apply_chat_template
        texts = [template(messages, add_generation_prompt=True, tokenize=False) for messages, _ in read]
        counts = []
        if answers is not None:
            prompts = texts
            turns = [{"role": "assistant", "content": answer.strip()} for answer in answers]
            texts = [
                template([*messages, turn], tokenize=False) for (messages, _), turn in zip(read, turns, strict=True)
            ]
            counts = [self._count_added(*pair) for pair in zip(prompts, texts, strict=True)]
        inputs = self.processor(
            images=images if any(images) else None,
            text=texts,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            **self.image_options,
        )
        return inputs.to(self.device), counts

    def _read(self, messages: Messages) -> tuple[Messages, list[Any]]:
        """A conversation in the processor's form, and its images in order.

        An image stands before its message's text. Where a text has a mark for every image, they stand there.
        """
        chat = ChatMessages(messages=messages)
        images, videos, sounds = chat.extract_media()
        if videos or sounds:
            raise ValueError("--model tokenpacker takes images and text; leave out tasks with videos or sounds")
        read = chat.to_hf_messages()
        for message in read:
            parts = message["content"]
            texts = [part for part in parts if part["type"] == "text"]
            marks = sum(count_marks(self.processor.image_token, part["text"]) for part in texts)
            if marks and marks == len(parts) - len(texts):
                message["content"] = texts
        return read, images

    def _count_added(self, prompt: str, text: str) -> int:
        """The number of tokens of `text` that are not those of `prompt`, with which it begins."""
        mark = self.processor.image_token_id
        shown = [ImageTokens([mark], [])] * count_marks(self.processor.image_token, prompt)
        rows = encode_prompts(self.processor.tokenizer, [prompt, text], [shown] * 2, mark, {"padding": False})
        before, whole = rows["input_ids"]
        same = takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False))
        return len(whole) - len(list(same))


class TokenPackerSimple(TokenPackerChat):
    """The same for `--force_simple`, where a task gives text and images."""

    is_simple = True

    def _settings(self, arguments: tuple) -> dict[str, Any]:
        return arguments[1]

    def _messages(self, arguments: tuple) -> Messages:
        context, _, doc_to_visual, doc_id, task, split = arguments
        return _user_turn(context, doc_to_visual(self.task_dict[task][split][doc_id]))


class StopTexts(StoppingCriteria):
    """Ends each answer when it has one of the texts, so that nothing is generated that would be cut off."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], prompt_length: int):
        self.tokenizer, self.texts, self.prompt_length = tokenizer, texts, prompt_length
        self.num_read = 1 + max(len(text.encode()) for text in texts)  # tokens; one has at least a byte

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """(B,), whether the answer of each row is complete."""
        last = input_ids[:, max(self.prompt_length, input_ids.shape[1] - self.num_read) :]
        decoded = self.tokenizer.batch_decode(last, skip_special_tokens=True)
        return torch.tensor([any(text in row for text in self.texts) for row in decoded], device=input_ids.device)


def generation_options(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Arguments of transformers' `generate`, and the texts that end an answer, for a task's `generation_kwargs`.

    A temperature of 0, or none, takes the most likely token always.

    Raises:
        ValueError: for an option that `generate` does not have.
    """
    given = {name: value for name, value in settings.items() if name not in ("until", *OF_OTHER_MODELS)}
    for name in settings.keys() & set(OF_OTHER_MODELS):
        logger.warning(f"{name}={settings[name]} is an option of other models; the model's own image mode holds")
    check_names(given, vars(GenerationConfig()).keys(), "--gen_kwargs or generation_kwargs of the task")
    options = {"max_new_tokens": MAX_NEW_TOKENS} | given
    temperature = given.get("temperature")
    if temperature is None:
        temperature = 1.0 if given.get("do_sample") else 0.0
    options["do_sample"] = temperature > 0 and given.get("do_sample", True)
    if not options["do_sample"]:
        options |= {"temperature": None, "top_p": None, "top_k": None}
    until = settings.get("until") or []
    return options, [text for text in ([until] if isinstance(until, str) else until) if text]


def _user_turn(text: str, images: Sequence[Any] | None) -> Messages:
    content = [{"type": "image", "url": image} for image in images or ()]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
