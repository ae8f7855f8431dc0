"""Measures exported models beside torch: sizes, speed, and how many answers are torch's.

    python -m benchmarks.export [--clip-l] [--rounds N] [--threads N] [--json FILE]

exports the carried model to every runtime and prints Markdown tables; all figures go to FILE. With --clip-l it measures
a random model with CLIP-L's tower in its place, without answers. Ten minutes on two cores.
"""

from __future__ import annotations

import contextlib
import io
import os
import statistics
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.side_by_side import Call, arguments, median_ratio, report, time_in_turns
from tokenpacker.export import ExportedAnswerer, compare_answers, export_model
from tokenpacker.hf import (
    TokenPackerConfig,
    TokenPackerForConditionalGeneration,
    TokenPackerProcessor,
    carried_model_path,
)

EXPORTS = {
    "ONNX Runtime": ("onnx", None),
    "ONNX Runtime, int8": ("onnx", "int8"),
    "OpenVINO": ("openvino", None),
    "OpenVINO, int8": ("openvino", "int8"),
}
QUESTIONS = 200
TILES = {"carried": 10, "CLIP-L": 2}  # nine and the thumbnail; two, so that a round takes seconds
NEW_TOKENS = 16
PARTS = {"tiles": "tiles to packed tokens", "answer": f"prompt and {NEW_TOKENS} tokens"}


def main() -> None:
    """Measures and prints the tables."""
    flags = {"clip-l": "a random model with CLIP-L's tower"}
    options = arguments("export", __doc__.splitlines()[0], rounds=9, threads=1, flags=flags)
    os.environ |= {"CI": "true", "NNCF_CI": "1"}  # else the converters of OpenVINO send statistics of use
    name = "CLIP-L" if options.clip_l else "carried"
    model, processor = clip_l() if options.clip_l else carried()
    with tempfile.TemporaryDirectory() as place:
        figures = measure(model, processor, Path(place), name, options.rounds, options.threads)
    head, *rows = [line.strip("| ").split(" | ") for line in tables(figures) if not line.startswith("|--")]
    report(figures, head, rows, [], options.json)


def carried() -> tuple[TokenPackerForConditionalGeneration, TokenPackerProcessor]:
    """The carried model and its processor."""
    folder = carried_model_path()
    model = TokenPackerForConditionalGeneration.from_pretrained(folder).eval()
    return model, TokenPackerProcessor.from_pretrained(folder)


def clip_l() -> tuple[TokenPackerForConditionalGeneration, TokenPackerProcessor]:
    """Random weights: the tower of CLIP-L/336 and the projector at their full size, a small language model."""
    _, processor = carried()
    tower = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = TokenPackerConfig(
        {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, **tower},
        {
            "model_type": "llama",
            "vocab_size": len(processor.tokenizer),
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "eos_token_id": 2,
        },
        image_token_id=processor.image_token_id,
    )
    model = TokenPackerForConditionalGeneration(config).eval()
    return model, TokenPackerProcessor.from_config(config, processor.tokenizer)


def measure(model: Any, processor: Any, place: Path, name: str, rounds: int, threads: int) -> dict[str, Any]:
    """Sizes and times of all variants, and the agreement of their answers for the carried model."""
    inputs = question(model, TILES[name])
    calls: dict[str, dict[str, Call]] = {part: {"torch": torch_call(model, inputs, part)} for part in PARTS}
    sizes = {"torch": sum(weight.nbytes for weight in model.parameters())}
    agreement = {}
    for variant, (to, quantize) in EXPORTS.items():
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            manifest = export_model(model, processor, place / variant, to=to, quantize=quantize)  # type: ignore[arg-type]
        answerer = ExportedAnswerer(place / variant, threads)
        sizes[variant] = manifest.total_bytes()
        if name == "carried":
            agreement[variant] = compare_answers(model, answerer, QUESTIONS).to_dict()
        answerer.end_ids = set()  # so that every answer has the same length
        calls["tiles"][variant] = partial(answerer._packed_tokens, inputs)
        calls["answer"][variant] = partial(lambda runner: list(runner.generate(inputs, NEW_TOKENS)), answerer)
    times = {part: time_in_turns(variants, rounds) for part, variants in calls.items()}
    tokens = int(inputs["input_ids"].shape[1])
    figures = {"model": name, "tiles": TILES[name], "prompt_tokens": tokens, "bytes": sizes, "times": times}
    return figures | {"agreement": agreement}


def question(model: Any, num_tiles: int) -> dict[str, Any]:
    """A prompt of ordinary and image tokens, and random tiles of them."""
    config = model.config
    image_tokens = [config.image_token_id] * config.projector.num_tokens(config.patch_grid) * num_tiles
    rng = np.random.default_rng(0)
    tiles = rng.normal(size=(num_tiles, 3, *config.tile_size)).astype(np.float32)
    factors = np.full(num_tiles, config.projector.scale_factor)
    ids = np.array([[1, *image_tokens, *range(20, 40)]])
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "pixel_values": tiles, "scale_factors": factors}


def torch_call(model: Any, inputs: dict[str, Any], part: str) -> Call:
    """The same part by torch's model, with the projector as it is."""
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}

    def call() -> Any:
        with torch.inference_mode():
            if part == "tiles":
                return model.get_image_features(tensors["pixel_values"])
            return model.generate(**tensors, **length, do_sample=False, pad_token_id=0)

    return call


def tables(figures: dict[str, Any]) -> list[str]:
    """Lines of a Markdown table: size, median times with the speed over torch, equal and right answers."""
    parts = [f"{PARTS[part]}, ms" for part in PARTS]
    head = ["", "MB", *(cell for part in parts for cell in (part, "speed-up", "in CPU time"))]
    head += ["answers equal to torch's", "right answers, torch's"] if figures["agreement"] else []
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for variant, size in figures["bytes"].items():
        cells = [variant, f"{size / 1e6:,.1f}"]
        for times in figures["times"].values():
            wall, cpu = (median_ratio(times, "torch", variant, clock) for clock in ("wall_ms", "cpu_ms"))
            cells += [f"{statistics.median(times[variant]['wall_ms']):,.1f}", f"{wall:.2f} x", f"{cpu:.2f} x"]
        if figures["agreement"]:
            of = figures["agreement"].get(variant)
            equal = f"{of['equal_answers']} of {of['questions']}" if of else "-"
            right = f"{of['exported_correct']}, {of['torch_correct']} of {of['scored']}" if of else "-"
            cells += [equal, right]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
