"""Measures what 64 regions of one photo of 12 megapixels add to the time to the first token.

    python -m benchmarks.regions [--small] [--rounds N] [--threads N] [--json FILE]

prints a Markdown table, and writes all figures to FILE. The model has random weights and the shapes of CLIP-L/336 and
of a language model of 135 million parameters. It takes some minutes on two cores. `--small` runs in seconds on small
shapes, whose figures mean nothing.

Regions are compared with two prompts: one that is as long but names things by words, and a short question, against
which the regions' places in the prompt count too.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from benchmarks.preprocessing import QUALITY, landscape
from benchmarks.side_by_side import Target, Times, arguments, report, time_in_turns
from tokenpacker.carried.vocabulary import train_tokenizer
from tokenpacker.hf import TokenPackerConfig, TokenPackerForConditionalGeneration, TokenPackerProcessor, add_regions
from tokenpacker.hf.outputs import ImageFeatures
from tokenpacker.hf.regions.masks import to_mask
from tokenpacker.speed.model_sizes import CLIP_LARGE_336

NUM_REGIONS = 64
NUM_POINTS = 40  # of a polygon
REGION_SIDES = (0.05, 0.3)  # shares of the photo's
MOST_SHARE = 0.05  # of the time to the first token
SIZE, SMALL_SIZE = (3000, 4000), (300, 400)
SHORT = "short"  # a prompt without regions or words in their place
STATIONS = ("processor", "vision and projector", "region encoder", "prefill")
IMAGES = {"1 tile": {"image_mode": "pad"}, "9 tiles and a thumbnail": {"image_mode": "slice", "max_tiles": 9}}
TEXT = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
SMALL = {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 3}


def main() -> None:
    """Measures both images with each form of region, and prints the time that regions add."""
    options = arguments("regions", __doc__.splitlines()[0], rounds=5, flags={"small": "try it out on small shapes"})
    torch.manual_seed(0)
    model, processor = build(options.small)
    size = SMALL_SIZE if options.small else SIZE
    forms = regions_of(size)
    figures: dict[str, Any] = {"size": size, "num_regions": NUM_REGIONS, "transformers": transformers.__version__}
    figures |= {"shapes": [SMALL] if options.small else [CLIP_LARGE_336, TEXT], "images": {}}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        file = Path(folder) / "photo.jpg"
        landscape(size, seed=0).save(file, quality=QUALITY)
        for name, settings in IMAGES.items():
            for setting, value in settings.items():
                setattr(processor.image_processor, setting, value)
            figures["images"][name] = measure(model, processor, file, forms, options.rounds)
    show(figures, options.json)


def build(small: bool) -> tuple[TokenPackerForConditionalGeneration, TokenPackerProcessor]:
    """A model with regions and random weights, and its processor."""
    tokenizer = train_tokenizer()
    vision, text = (shapes | (SMALL if small else {}) for shapes in (CLIP_LARGE_336, TEXT))
    config = TokenPackerConfig(
        {"model_type": "clip_vision_model", **vision},
        {"model_type": "llama", "pad_token_id": tokenizer.pad_token_id, **text},
        projector_config={"name": "token-packer", "num_heads": 3 if small else 8},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = TokenPackerForConditionalGeneration(config).eval()
    processor = TokenPackerProcessor.from_config(config, tokenizer)
    add_regions(model, processor)
    return model.eval(), processor


def regions_of(size: tuple[int, int]) -> dict[str, list[Any]]:
    """The same regions of an image as boxes, as polygons within the boxes, and as masks of the polygons."""
    generator = np.random.default_rng(0)
    height, width = size
    boxes, polygons = [], []
    for _ in range(NUM_REGIONS):
        box_height, box_width = generator.uniform(*REGION_SIDES, 2) * size
        top, left = generator.uniform(0, 1, 2) * (height - box_height, width - box_width)
        boxes.append((left, top, left + box_width, top + box_height))
        angles = np.linspace(0, 2 * np.pi, NUM_POINTS, endpoint=False)
        radii = generator.uniform(0.6, 1, NUM_POINTS) / 2
        x, y = left + box_width * (0.5 + radii * np.cos(angles)), top + box_height * (0.5 + radii * np.sin(angles))
        polygons.append([np.stack([x, y], axis=1).flatten().tolist()])
    return {"boxes": boxes, "polygons": polygons, "arrays": [to_mask(polygon, size) for polygon in polygons]}


def measure(
    model: TokenPackerForConditionalGeneration,
    processor: TokenPackerProcessor,
    file: Path,
    forms: dict[str, list[Any]],
    rounds: int,
) -> dict[str, Any]:
    """The times of each station without regions, and with each form of region if the form may matter."""
    asked = "what are these?"
    marked = f"<image>\n{'<mask>' * NUM_REGIONS} {asked}"
    calls = {"none": lambda: processor(file, f"<image>\n{asked}", return_tensors="pt")}
    for form, regions in forms.items():
        calls[form] = lambda regions=regions: processor(file, marked, region_masks=[regions], return_tensors="pt")
    short, with_regions = calls["none"](), calls["boxes"]()
    ids, word = with_regions["input_ids"], processor.tokenizer.convert_tokens_to_ids("7")
    plain = {**with_regions, "input_ids": ids.masked_fill(ids == processor.region_token_id, word)}
    pixels = short["pixel_values"]
    features = model.model.vision_features(pixels)
    packed = model.model.multi_modal_projector(features)
    cells, first_tile = with_regions["region_cells"], with_regions["region_first_tile"]
    tokens = model.model.region_encoder(features, cells, first_tile)
    # The vision tower runs equally often with and without regions, so it is timed once; the region encoder by itself.
    return {
        "prompt_tokens": plain["input_ids"].shape[1],
        "short_tokens": short["input_ids"].shape[1],
        "processor": time_in_turns(calls, rounds),
        "vision and projector": time_in_turns({"none": lambda: model.get_image_features(pixels)}, rounds),
        "region encoder": time_in_turns(
            {"any": lambda: model.model.region_encoder(features, cells, first_tile)}, rounds
        ),
        "prefill": time_in_turns(
            {
                SHORT: lambda: prefill(model, short, packed),
                "none": lambda: prefill(model, plain, packed),
                "any": lambda: prefill(model, with_regions, packed, tokens),
            },
            rounds,
        ),
    }


def prefill(
    model: TokenPackerForConditionalGeneration, inputs: Any, packed: Tensor, regions: Tensor | None = None
) -> Tensor:
    """The logits of the first token, from encoded images and regions."""
    ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    encoded = {"image": ImageFeatures(pooler_output=packed, region_tokens=regions)}
    return model(**ids, mm_encoder_outputs=encoded, logits_to_keep=1, use_cache=True).logits


def share_added(of: dict[str, Any], form: str, clock: str, prompt: str = "none") -> float:
    """The share that a form of regions adds to the time to the first token, from each station's median.

    Args:
        prompt: the prompt to compare with; `none` is the one that is as long.
    """
    without, more = 0.0, statistics.median(of["region encoder"]["any"][clock])
    for station, base, variant in (("processor", "none", form), ("prefill", prompt, "any")):
        pairs = list(zip(of[station][base][clock], of[station][variant][clock], strict=True))
        without += statistics.median(before for before, _ in pairs)
        more += statistics.median(now - before for before, now in pairs)
    return more / (without + statistics.median(of["vision and projector"]["none"][clock]))


def median_ms(times: Times, form: str) -> float | None:
    """A station's time with this form of regions, else with any form, else without regions; None if it did not run."""
    variants = [form] if form == "none" else [form, "any", "none"]
    return next((statistics.median(times[variant]["wall_ms"]) for variant in variants if variant in times), None)


def show(figures: dict[str, Any], file: Path | None) -> None:
    """The table and the verdicts."""
    head = [
        "image",
        "regions",
        *(f"{station}, ms" for station in STATIONS),
        "added",
        "in CPU time",
        "with their places",
        "in CPU time",
    ]
    rows, verdicts = [], []
    for image, of in figures["images"].items():
        for form in of["processor"]:
            cells = [f"{time:.1f}" if (time := median_ms(of[station], form)) else "" for station in STATIONS]
            rows.append([image, form, *cells, *[""] * 4])
            if form != "none":
                clocks = ("wall_ms", "cpu_ms")
                shares = [share_added(of, form, clock, prompt) for prompt in ("none", SHORT) for clock in clocks]
                rows[-1][-4:] = [f"{share:.2%}" for share in shares]
                figure = f"{image}, {NUM_REGIONS} {form}: share that they add"
                verdicts.append(Target(figure, "at most", MOST_SHARE).verdict(shares[0]))
                verdicts.append(Target(f"{figure} with their places", "at most", MOST_SHARE).verdict(shares[2]))
        verdicts.append(
            f"- {image}: a prompt of {of['prompt_tokens']} tokens, {of['short_tokens']} without the regions"
        )
    report(figures, head, rows, verdicts, file)


if __name__ == "__main__":
    main()
