"""Answers questions from an exported folder, in ONNX Runtime or OpenVINO, without a torch model.

Shapes: N tiles, T packed tokens of a tile, K packed tokens of all tiles, S tokens of the prompt, D language width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from transformers import GenerationConfig

from tokenpacker.export.manifest import Manifest
from tokenpacker.hf import TokenPackerProcessor
from tokenpacker.router import AUTO, ScaleFactor, own_router

Array = npt.NDArray[Any]
Feeds = dict[str, Array]
Run = Callable[[Feeds], Feeds]
_FIRST = Lock()
INCOMPLETE = "\ufffd"  # what a tokenizer shows for the first bytes of a character


class ExportedAnswerer:
    """A model as `tokenpacker export` wrote it. Answers are greedy. All methods may be called from several threads.

    Args:
        folder: with the graphs, the config and the processor.
        num_threads: that the runtime uses for one call; None leaves the number to it.

    Raises:
        ValueError: for a folder that is no export, and for files that are missing or damaged.
        ImportError: if the runtime is not installed.
    """

    def __init__(self, folder: Path | str, num_threads: int | None = None):
        self.folder = Path(folder).expanduser()
        self.manifest = Manifest.read(self.folder)
        if find_spec({"onnx": "onnxruntime"}.get(self.manifest.runtime, "openvino")) is None:
            raise ImportError(f"{folder} runs on {self.manifest.runtime}; run: pip install 'tokenpacker[export]'")
        self.processor = TokenPackerProcessor.from_pretrained(self.folder)
        end = GenerationConfig.from_pretrained(self.folder).eos_token_id
        self.end_ids = {end} if isinstance(end, int) else set(end or ())
        opened = _open_onnx if self.manifest.runtime == "onnx" else _open_openvino
        self._embed, self._decoder = (
            opened(self.folder / file, num_threads) for file in (self.manifest.embed_tokens, self.manifest.decoder)
        )
        self._vision = {
            entry["scale_factor"]: opened(self.folder / entry["file"], num_threads)
            for entry in self.manifest.vision_encoders
        }

    def answer(self, messages: Sequence[dict[str, Any]], images: Sequence[Image.Image] = (), **options: Any) -> str:
        """The answer to the last of the messages; arguments as for `stream`."""
        return "".join(text for _, text in self.stream(messages, images, **options)).strip()

    def stream(
        self,
        messages: Sequence[dict[str, Any]],
        images: Sequence[Image.Image] = (),
        *,
        scale_factor: ScaleFactor | None = None,
        max_image_tokens: int | None = None,
        max_new_tokens: int = 256,
    ) -> Iterator[tuple[int, str]]:
        """Each token of the answer as it comes, with the text that is complete by then; the end token comes last.

        Args:
            messages: for `processor.apply_chat_template`, with `{"type": "image"}` where an image belongs.
            images: in the order of those parts.
            scale_factor: for every image; "auto" for each tile by its detail, None for the export's default.
            max_image_tokens: limit per image, separators included; None sets no limit.

        Raises:
            ValueError: for a scale factor that was not exported, a prompt that is too long, and images and options that
                the processor refuses.
        """
        inputs = self.prepare(messages, images, scale_factor, max_image_tokens)
        return self._with_text(self.generate(inputs, max_new_tokens))

    def prepare(
        self,
        messages: Sequence[dict[str, Any]],
        images: Sequence[Image.Image],
        scale_factor: ScaleFactor | None = None,
        max_image_tokens: int | None = None,
    ) -> Feeds:
        """The processor's `input_ids` (1, S), with images `pixel_values` and `scale_factors`. Raises as `stream`."""
        factors = self.manifest.scale_factors
        wanted = own_router(self.processor.router).scale_factors if scale_factor == AUTO else (scale_factor,)
        missing = [factor for factor in wanted if factor is not None and factor not in factors]
        if missing:
            exported, name = ", ".join(map(str, factors)), "a tile's " if scale_factor == AUTO else ""
            raise ValueError(f"{name}scale_factor={missing[0]} was not exported; use {exported}, or export it, too")
        prompt = self.processor.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        plan = {"scale_factor": scale_factor or factors[0], "max_image_tokens": max_image_tokens}
        inputs = self.processor(images=[list(images)] if images else None, text=[prompt], return_tensors="np", **plan)
        length, most = inputs["input_ids"].shape[1], self.manifest.max_positions
        if most is not None and length >= most:
            raise ValueError(
                f"the prompt has {length} tokens but the model reads fewer than {most}; pack more, or use fewer images"
            )
        return {name: np.asarray(value) for name, value in inputs.items()}

    def generate(self, inputs: Feeds, max_new_tokens: int = 256) -> Iterator[int]:
        """The tokens of the greedy answer to what `prepare` returned, the end token included."""
        ids, decoder, cache = inputs["input_ids"], self._decoder(), self._empty_cache()
        embeddings = self._prompt_embeddings(inputs)
        past, room = 0, max_new_tokens
        if self.manifest.max_positions is not None:
            room = min(room, self.manifest.max_positions - ids.shape[1])
        for _ in range(room):
            end = past + embeddings.shape[1]
            outputs = decoder(
                {
                    "inputs_embeds": embeddings,
                    "attention_mask": np.ones((1, end), np.int64),
                    "position_ids": np.arange(past, end)[None],
                    **cache,
                }
            )
            token = int(outputs["logits"][0, -1].argmax())
            yield token
            if token in self.end_ids:
                return
            present = {name: value for name, value in outputs.items() if name.startswith("present.")}
            cache = {name.replace("present", "past_key_values", 1): value for name, value in present.items()}
            embeddings, past = self._embed()({"input_ids": np.array([[token]])})["inputs_embeds"], end

    def _prompt_embeddings(self, inputs: Feeds) -> Array:
        """(1, S, D), packed tokens in their places."""
        ids = inputs["input_ids"].astype(np.int64)
        embeddings = np.array(self._embed()({"input_ids": ids})["inputs_embeds"])  # a copy that may be written
        if "pixel_values" in inputs:
            embeddings[ids == self.manifest.image_token_id] = self._packed_tokens(inputs)
        return embeddings

    def _packed_tokens(self, inputs: Feeds) -> Array:
        """(K, D), of all tiles in order, each at its own scale factor."""
        tiles = inputs["pixel_values"].astype(np.float32)
        factors = inputs.get("scale_factors", np.full(len(tiles), None))
        packed: list[Any] = [None] * len(tiles)
        for factor in dict.fromkeys(factors.tolist()):
            places = [place for place, own in enumerate(factors) if own == factor]
            features = self._vision[factor]()({"pixel_values": tiles[places]})["image_features"]  # (n, T, D)
            for place, tokens in zip(places, features, strict=True):
                packed[place] = tokens
        return np.concatenate(packed)

    def _empty_cache(self) -> Feeds:
        size = self.manifest.cache
        empty = np.zeros((1, size["heads"], 0, size["head_dim"]), np.float32)
        return {f"past_key_values.{i}.{part}": empty for i in range(size["layers"]) for part in ("key", "value")}

    def _with_text(self, tokens: Iterator[int]) -> Iterator[tuple[int, str]]:
        ids: list[int] = []
        told = ""
        for token in tokens:
            ids.append(token)
            text = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
            piece = "" if text.endswith(INCOMPLETE) else text[len(told) :]
            told += piece
            yield token, piece


def _open_onnx(path: Path, num_threads: int | None) -> Callable[[], Run]:
    """A function that gives a call of the graph for one thread; sessions of ONNX Runtime serve several."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads or 0
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of several classes without a common base
        raise _unreadable(path, error) from None
    names = [output.name for output in session.get_outputs()]
    return lambda: lambda feeds: dict(zip(names, session.run(names, feeds), strict=True))


@cache
def _openvino_core() -> Any:
    """The one of this process: when two end in the order of their beginning, the next signal ends the process.

    Each sets a stack for signals on processors with AMX, and gives back the one before it, which is gone by then.
    """
    import openvino

    return openvino.Core()


def _open_openvino(path: Path, num_threads: int | None) -> Callable[[], Run]:
    """As `_open_onnx`; every call of the returned function makes a request, which belongs to one thread."""
    # Else processors with AMX compute in bfloat16, and with one thread fail (openvinotoolkit/openvino#33300).
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": num_threads or 0}
    try:
        with _FIRST:  # else two threads could make two
            core = _openvino_core()
        compiled = core.compile_model(path, "CPU", config)
    except RuntimeError as error:
        raise _unreadable(path, error) from None

    def request() -> Run:
        infer = compiled.create_infer_request().infer
        return lambda feeds: {port.any_name: value for port, value in infer(feeds).items()}

    return request


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} cannot be read ({' '.join(str(error).split())[:200]}); export the model anew")
