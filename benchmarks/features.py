"""Compares the vision features of this package with a vision tower that runs to its end and keeps all hidden states.

    python -m benchmarks.features [--rounds N] [--threads N] [--json FILE]

prints a Markdown table, and writes all figures to FILE. A random tower of CLIP-L/336's shape on one tile, float32;
three minutes on two cores.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from benchmarks.side_by_side import Target, arguments, median_ratio, peak_tensor_mib, report, time_in_turns
from tokenpacker import VisionFeatures
from tokenpacker.hf.vision_encoder import encode_tiles, encoder_layers

LEVELS, NUM_LAYERS, PATCH_GRID = (12, 16, 22, 23), 24, (24, 24)
TIME_SHARE = 23 / 24 + 0.02
MEMORY_SHARE = 0.25


def main() -> None:
    """Measures and prints the comparison."""
    options = arguments("features", __doc__.splitlines()[0], rounds=7)
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    full = CLIPVisionModel(config).eval()
    config.num_hidden_layers = max(LEVELS)  # what `build_vision_tower` builds
    short = CLIPVisionModel(config).eval()
    short.load_state_dict(full.state_dict(), strict=False)
    pixels = torch.randn(1, 3, 336, 336)
    variants = {
        "full tower, nothing kept": lambda: full(pixels).last_hidden_state,
        "full tower, all hidden states": lambda: all_hidden_states(full, pixels),
        "package": lambda: encode_tiles(short, pixels, PATCH_GRID, LEVELS, LEVELS[-1])[0],
    }
    with torch.inference_mode():
        assert len(encoder_layers(short)) == max(LEVELS)
        expected, features = variants["full tower, all hidden states"](), variants["package"]()
        assert torch.equal(expected.levels, features.levels), "the variants give other features"
        del expected, features
        times = time_in_turns(variants, options.rounds)
        peaks = {name: peak_tensor_mib(call) for name, call in variants.items()}
    show({"times": times, "peak_mib": peaks}, options.json)


def all_hidden_states(tower: CLIPVisionModel, pixels: torch.Tensor) -> VisionFeatures:
    """Features by the tower's own means."""
    hidden_states = tower(pixels, output_hidden_states=True).hidden_states
    return VisionFeatures.from_hidden_states(hidden_states, PATCH_GRID, LEVELS, num_prefix_tokens=1)


def show(figures: dict[str, Any], file: Path | None) -> None:
    """The table and the verdicts."""
    times = figures["times"]
    nothing, everything, package = times
    share, cpu_share = (median_ratio(times, package, nothing, clock) for clock in ("wall_ms", "cpu_ms"))
    peaks = figures["peak_mib"]
    extra = {name: peak - peaks[nothing] for name, peak in peaks.items()}
    rows = [
        [
            name,
            f"{statistics.median(of['wall_ms']):.0f}",
            f"{median_ratio(times, name, nothing):.3f}",
            f"{median_ratio(times, name, nothing, 'cpu_ms'):.3f}",
            f"{peaks[name]:.1f}",
            f"{extra[name]:.1f}",
        ]
        for name, of in times.items()
    ]
    figures |= {
        "time_share": share,
        "cpu_time_share": cpu_share,
        "extra_mib": extra,
        "memory_share": extra[package] / extra[everything],
    }
    verdicts = [
        Target("time, of the full tower's", "at most", TIME_SHARE).verdict(share),
        Target("processor time, of the full tower's", "at most", TIME_SHARE).verdict(cpu_share),
        Target("extra memory, of keeping all hidden states", "at most", MEMORY_SHARE).verdict(figures["memory_share"]),
    ]
    head = ["variant", "median ms", "of the full tower's", "in CPU time", "peak MiB", "above nothing kept, MiB"]
    report(figures, head, rows, verdicts, file)


if __name__ == "__main__":
    main()
