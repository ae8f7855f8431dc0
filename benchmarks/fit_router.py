"""Fits the thresholds of `scale_factor="auto"` to a carried model, and asks held-out questions at each bound.

    python -m benchmarks.fit_router --model tiny --out router.json
    python -m benchmarks.fit_router --model tiny --out router.json --write 0.2

The tiles are those of fine print's training images; the held-out images are others of that split, which no fit saw.
`--out` keeps the measured losses, so that another call fits without measuring again. For another model or
other data see docs/auto.md.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch

from tokenpacker.evaluate.evaluation import evaluate
from tokenpacker.evaluate.tasks import Task
from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor
from tokenpacker.hub import resolve
from tokenpacker.progress import Progress
from tokenpacker.router import AUTO
from tokenpacker.scenes import FinePrint
from tokenpacker.scenes.router_fit import TileLoss, fit_router, tile_losses

BOUNDS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
FIRST_HELD_OUT = 5000  # of fine print's training split


def main() -> None:
    """Measures, fits, asks, and writes a bound's thresholds into the model's folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--scale-factors", default="4,6,12", help="the finest first")
    parser.add_argument("--images", type=int, default=400, help="to fit on")
    parser.add_argument("--held-out", type=int, default=200, help="images to ask about")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--write", type=float, metavar="BOUND", help="put its thresholds into processor_config.json")
    given = parser.parse_args()
    factors = tuple(map(int, given.scale_factors.split(",")))
    folder = Path(resolve(given.model))
    model = TokenPackerForConditionalGeneration.from_pretrained(folder).eval()
    processor = TokenPackerProcessor.from_pretrained(folder)
    kept = (
        json.loads(given.out.read_text()) if given.out.is_file() else measure(model, processor, factors, given.images)
    )
    if tuple(kept["scale_factors"]) != factors:
        raise SystemExit(f"{given.out} has scale factors {kept['scale_factors']}; delete it, or give these")
    given.out.write_text(json.dumps(kept))
    tiles = [TileLoss(**tile) for tile in kept["tiles"]]
    if given.write is not None:
        path = folder / "processor_config.json"
        config = json.loads(path.read_text())
        config["router"] = fit_router(kept["base"], tiles, factors, given.write).to_dict()
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        return
    images = FinePrint("train")
    held_out = [images[FIRST_HELD_OUT + index] for index in range(given.held_out)]
    task = Task(name="held-out fine print", description="", load=lambda: held_out)
    for bound in (None, *BOUNDS):
        processor.router = None if bound is None else fit_router(kept["base"], tiles, factors, bound).to_dict()
        scale_factor = factors[0] if bound is None else AUTO
        result = evaluate(model, processor, task, scale_factor=scale_factor, progress=False)
        print(f"bound {bound}: {result.summary()} {processor.router or ''}", flush=True)


def measure(model, processor, factors: tuple[int, ...], count: int) -> dict:
    """The losses of the tiles of `count` images, JSON-ready."""
    torch.set_num_threads(1)
    images, base, tiles, start = FinePrint("train"), 0.0, [], time.perf_counter()
    with Progress("tiles of fine print", count) as shown:
        for index in range(count):
            loss, own = tile_losses(model, processor, images[index], factors)
            base += loss
            tiles += own
            shown.update(index + 1)
    seconds = time.perf_counter() - start
    return {"scale_factors": factors, "base": base, "tiles": [asdict(tile) for tile in tiles], "seconds": seconds}


if __name__ == "__main__":
    main()
