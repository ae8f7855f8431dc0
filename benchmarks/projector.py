"""Compares TokenPacker, and what `TokenPacker.fold` makes of it, with a module written from the paper's equations.

    python -m benchmarks.projector [--rounds N] [--threads N] [--small] [--json FILE]

prints a Markdown table, and writes all figures to FILE. Three minutes on two cores.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.side_by_side import MIB, Call, Target, arguments, median_ratio, peak_tensor_mib, report, time_in_turns
from tokenpacker import TokenPacker, TokenPackerProjectorConfig, VisionFeatures

VISION_DIM, LANGUAGE_DIM, PATCH_GRID = 1024, 4096, (24, 24)  # CLIP-L/336 and Vicuna-7B
BATCH = 8
SCALE_FACTORS = (2, 3, 4)
SPEEDUP = {2: 1.15, 3: 1.15, 4: 1.1}
MEMORY_SHARE = 0.6
EQUAL = 1e-5  # of the largest value: two float32 orders of summation


class Straightforward(nn.Module):
    """The equations as they stand: windows by permutation, torch's own attention over them."""

    def __init__(self, packer: TokenPacker):
        super().__init__()
        self.packer = packer
        attention = packer.attention
        self.attention = nn.MultiheadAttention(packer.config.vision_dim, attention.num_heads)
        parts = (attention.query_proj, attention.key_proj, attention.value_proj)
        with torch.no_grad():
            self.attention.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
            self.attention.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        self.attention.out_proj = attention.output_proj  # type: ignore[assignment]

    def forward(self, query: Tensor, levels: Tensor, scale: int) -> Tensor:
        """(N, T, D)."""
        packer, num_tiles = self.packer, len(query)
        image = query.transpose(1, 2).unflatten(2, PATCH_GRID)  # (N, C, h, w)
        coarse = F.interpolate(image, scale_factor=1 / scale, mode="bilinear").flatten(2).transpose(1, 2)  # (N, T, C)
        queries = packer.query_norm(packer.query_proj(coarse)).flatten(0, 1)[None]  # (1, N*T, C)
        keys = _windows(packer.key_norm(packer.key_mlp(levels)), scale)  # (s*s, N*T, C)
        values = _windows(packer.value_norm(packer.value_mlp(levels)), scale)
        attended, _ = self.attention(queries, keys, values, need_weights=False)
        return packer.output_mlp(attended[0].unflatten(0, (num_tiles, -1)))


def _windows(tokens: Tensor, scale: int) -> Tensor:
    """(N, L, C) -> (s*s, N*T, C)."""
    rows, cols = (length // scale for length in PATCH_GRID)
    image = tokens.unflatten(1, (rows, scale, cols, scale))  # (N, rows, s, cols, s, C)
    return image.permute(2, 4, 0, 1, 3, 5).reshape(scale * scale, -1, tokens.shape[2])


def main() -> None:
    """Measures and prints the comparison."""
    options = arguments("projector", __doc__.splitlines()[0], rounds=9, flags={"small": "narrow, for a try"})
    torch.manual_seed(0)
    vision_dim, language_dim = (256, 512) if options.small else (VISION_DIM, LANGUAGE_DIM)
    packer = TokenPacker(TokenPackerProjectorConfig(vision_dim=vision_dim, language_dim=language_dim)).eval()
    straightforward, folded = Straightforward(packer).eval(), packer.fold()
    length = PATCH_GRID[0] * PATCH_GRID[1]
    query, levels = torch.randn(BATCH, length, vision_dim), torch.randn(BATCH, length, 4 * vision_dim)
    features = VisionFeatures(query, levels, PATCH_GRID)
    figures: dict[str, Any] = {"batch": BATCH, "vision_dim": vision_dim, "language_dim": language_dim}
    figures["weights_mib"] = {"package": _weights_mib(packer), "folded": _weights_mib(folded)}
    figures["scale_factors"] = {}
    with torch.inference_mode():
        for scale in SCALE_FACTORS:
            variants = {
                "straightforward": partial(straightforward, query, levels, scale),
                "package": partial(packer, features, scale),
                "folded": partial(folded, features, scale),
            }
            figures["scale_factors"][scale] = measure(variants, options.rounds)
    show(figures, options.json)


def measure(variants: Mapping[str, Call], rounds: int) -> dict[str, Any]:
    """Times, memory and, against the straightforward module, speed-ups and differences at one scale factor."""
    results = {name: call() for name, call in variants.items()}
    plain = results["straightforward"]
    differences = {name: ((result - plain).abs().max() / plain.abs().max()).item() for name, result in results.items()}
    assert max(differences.values()) < EQUAL, f"the variants differ, of the largest value, by {differences}"
    del results, plain
    times = time_in_turns(variants, rounds)
    return {
        "times": times,
        "speedup": {name: median_ratio(times, "straightforward", name) for name in variants},
        "cpu_speedup": {name: median_ratio(times, "straightforward", name, "cpu_ms") for name in variants},
        "peak_mib": {name: peak_tensor_mib(call) for name, call in variants.items()},
        "differences": differences,
    }


def show(figures: dict[str, Any], file: Any) -> None:
    """The table and the verdicts, which are about the folded module."""
    head = ["s", "module", "median ms", "speed-up", "in CPU time", "peak MiB", "share"]
    rows, verdicts = [], []
    for scale, of in figures["scale_factors"].items():
        memory = of["peak_mib"]
        share = {name: peak / memory["straightforward"] for name, peak in memory.items()}
        for name, times in of["times"].items():
            cells = [f"{statistics.median(times['wall_ms']):.0f}"]
            cells += [f"{of['speedup'][name]:.2f} x", f"{of['cpu_speedup'][name]:.2f} x"]
            rows.append([str(scale), name, *cells, f"{memory[name]:.0f}", f"{share[name]:.2f}"])
        speed = Target(f"speed-up at s = {scale}", "at least", SPEEDUP[scale])
        verdicts.append(speed.verdict(of["speedup"]["folded"]))
        verdicts.append(replace(speed, figure=f"{speed.figure} in CPU time").verdict(of["cpu_speedup"]["folded"]))
        verdicts.append(Target(f"memory at s = {scale}", "at most", MEMORY_SHARE).verdict(share["folded"]))
    weights = figures["weights_mib"]
    verdicts.append(f"- weights: {weights['package']:.0f} MiB, folded {weights['folded']:.0f} MiB")
    report(figures, head, rows, verdicts, file)


def _weights_mib(module: nn.Module) -> float:
    return sum(parameter.nbytes for parameter in module.parameters()) / MIB


if __name__ == "__main__":
    main()
