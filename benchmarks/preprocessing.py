"""Compares cutting a 2000 x 3000 JPEG into tiles with normalising all of it in floats and then interpolating.

    python -m benchmarks.preprocessing [--rounds N] [--threads N] [--json FILE]

prints a Markdown table, and writes all figures to FILE. It uses one thread by default and takes half a minute.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.side_by_side import Target, arguments, median_ratio, peak_process_mib, report, time_in_turns
from tokenpacker.hf import TokenPackerImageProcessor
from tokenpacker.hf.processing.image_processor import RELEASED_OPTIONS
from tokenpacker.images import ImageSource, load_image
from tokenpacker.tiling import make_tiles

SIZE = (2000, 3000)
QUALITY = 90
SPEEDUP = {"sound": 4.0, "released": 1.5}
# The sound variant rounds to grey levels and reads a reduced JPEG; the released pixels are compared as their tests do.
MEAN_DIFFERENCE = {"sound": 0.015, "released": 1e-6}  # a grey level is 0.015


def main() -> None:
    """Measures both variants, from the file and from the decoded picture, and prints the comparison."""
    options = arguments("preprocessing", __doc__.splitlines()[0], rounds=9, threads=1)
    processors = {"sound": TokenPackerImageProcessor(), "released": TokenPackerImageProcessor(**RELEASED_OPTIONS)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "picture.jpg"
        landscape(SIZE, seed=0).save(file, quality=QUALITY)
        figures: dict[str, Any] = {"size": SIZE, "file_bytes": file.stat().st_size, "cases": {}}
        sources: dict[str, ImageSource] = {"JPEG file": file, "decoded picture": load_image(file)}
        cases = [(name, start) for name in processors for start in sources]
        calls = {
            (name, start): {
                "plain": lambda name=name, start=start: plain_tiles(processors[name], sources[start]),
                "package": lambda name=name, start=start: processors[name](sources[start])["pixel_values"],
            }
            for name, start in cases
        }
        # before the timing, whose freed memory would be used again
        peaks = {case: {name: peak_process_mib(call) for name, call in calls[case].items()} for case in cases}
        for case in cases:
            figures["cases"][", ".join(case)] = measure(calls[case], options.rounds) | {"peak_mib": peaks[case]}
    show(figures, options.json)


def landscape(size: tuple[int, int], seed: int) -> Image.Image:
    """A picture with detail at all scales, each octave as strong as its size, about as in photographs."""
    generator = np.random.default_rng(seed)
    pixels = np.zeros((*size, 3), np.float32)
    for octave in range(9):
        height, width = (max(2, length >> octave) for length in size)
        noise = Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8))
        resized = np.asarray(noise.resize(size[::-1], Image.Resampling.BICUBIC), np.float32)
        pixels += (resized - 127.5) * 2 ** (octave / 2 - 4.5)
    return Image.fromarray((pixels + 127.5).clip(0, 255).astype(np.uint8))


def plain_tiles(processor: TokenPackerImageProcessor, source: ImageSource) -> Tensor:
    """The tiles, by way of the whole picture in floats."""
    picture = load_image(source)
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
    image.div_(255).sub_(mean[:, None, None]).div_(std[:, None, None])
    return make_tiles(
        image,
        processor.choose_grid((picture.height, picture.width)),
        (processor.tile_size[0], processor.tile_size[1]),
        thumbnail_source=processor.thumbnail_source,
        antialias=processor.antialias,
    )


def measure(calls: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Times, their ratio, and the difference of the pixels."""
    difference = (calls["plain"]() - calls["package"]()).abs()
    times = time_in_turns(calls, rounds)
    return {
        "times": times,
        "speedup": median_ratio(times, "plain", "package"),
        "cpu_speedup": median_ratio(times, "plain", "package", "cpu_ms"),
        "mean_difference": difference.mean().item(),
        "greatest_difference": difference.max().item(),
    }


def show(figures: dict[str, Any], file: Path | None) -> None:
    """The table and the verdicts."""
    head = ["variant, from", "plain, ms", "package, ms", "speed-up", "in CPU time", "plain, MiB", "package, MiB"]
    head += ["mean difference", "greatest"]
    rows, verdicts = [], [f"A picture of {SIZE[0]} x {SIZE[1]}, {figures['file_bytes']:,} bytes as a JPEG file.", ""]
    for case, of in figures["cases"].items():
        variant = case.split(",")[0]
        memory = of["peak_mib"]
        cells = [f"{statistics.median(times['wall_ms']):.0f}" for times in of["times"].values()]
        cells += [f"{of['speedup']:.2f} x", f"{of['cpu_speedup']:.2f} x"]
        cells += [f"{memory['plain']:.0f}", f"{memory['package']:.0f}"]
        cells += [f"{of['mean_difference']:.1e}", f"{of['greatest_difference']:.1e}"]
        rows.append([case, *cells])
        verdicts.append(Target(f"{case}: speed-up", "at least", SPEEDUP[variant]).verdict(of["speedup"]))
        assert of["mean_difference"] < MEAN_DIFFERENCE[variant], f"{case}: other pixels"
    report(figures, head, rows, verdicts, file)


if __name__ == "__main__":
    main()
