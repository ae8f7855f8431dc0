"""Compares TokenPacker with a module written straight from the paper's equations.

    python -m benchmarks.projector [--rounds N] [--threads N] [--json FILE]

prints a Markdown table, and writes all figures to FILE. Two minutes on two cores.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.side_by_side import MIB, Target, arguments, median_ratio, peak_tensor_mib, report, time_in_turns
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
    """Measures every scale factor and prints the comparison."""
    options = arguments("projector", __doc__.splitlines()[0], rounds=9)
    torch.manual_seed(0)
    config = TokenPackerProjectorConfig(vision_dim=VISION_DIM, language_dim=LANGUAGE_DIM)
    packer = TokenPacker(config).eval()
    straightforward = Straightforward(packer).eval()
    length = PATCH_GRID[0] * PATCH_GRID[1]
    query, levels = torch.randn(BATCH, length, VISION_DIM), torch.randn(BATCH, length, 4 * VISION_DIM)
    features = VisionFeatures(query, levels, PATCH_GRID)
    figures: dict[str, Any] = {"batch": BATCH, "scale_factors": {}}
    with torch.inference_mode():
        for scale in SCALE_FACTORS:
            figures["scale_factors"][scale] = measure(packer, straightforward, features, scale, options.rounds)
        folded = packer._fast_path.folded(packer, features)
    figures["folded_mib"] = folded.num_own_bytes / MIB if folded else 0.0
    show(figures, options.json)


def measure(
    packer: TokenPacker, straightforward: Straightforward, features: VisionFeatures, scale: int, rounds: int
) -> dict[str, Any]:
    """Times, their ratio, memory and the difference at one scale factor."""
    variants = {
        "straightforward": lambda: straightforward(features.query, features.levels, scale),
        "package": lambda: packer(features, scale),
    }
    results = {name: call() for name, call in variants.items()}
    difference = (results["package"] - results["straightforward"]).abs().max() / results["straightforward"].abs().max()
    assert difference < EQUAL, f"the variants differ by {difference:.1e} of the largest value"
    del results
    times = time_in_turns(variants, rounds)
    return {
        "times": times,
        "speedup": median_ratio(times, "straightforward", "package"),
        "cpu_speedup": median_ratio(times, "straightforward", "package", "cpu_ms"),
        "peak_mib": {name: peak_tensor_mib(call) for name, call in variants.items()},
        "difference": difference.item(),
    }


def show(figures: dict[str, Any], file: Any) -> None:
    """The table and the verdicts."""
    head = ["s", "straightforward, ms", "package, ms", "speed-up", "in CPU time"]
    head += ["straightforward, MiB", "package, MiB", "share"]
    rows, verdicts = [], []
    for scale, of in figures["scale_factors"].items():
        memory = of["peak_mib"]
        share = memory["package"] / memory["straightforward"]
        cells = [f"{statistics.median(times['wall_ms']):.0f}" for times in of["times"].values()]
        cells += [f"{of['speedup']:.2f} x", f"{of['cpu_speedup']:.2f} x"]
        cells += [f"{memory['straightforward']:.0f}", f"{memory['package']:.0f}", f"{share:.2f}"]
        rows.append([str(scale), *cells])
        verdicts.append(Target(f"speed-up at s = {scale}", "at least", SPEEDUP[scale]).verdict(of["speedup"]))
        verdicts.append(
            Target(f"speed-up at s = {scale} in CPU time", "at least", SPEEDUP[scale]).verdict(of["cpu_speedup"])
        )
        verdicts.append(Target(f"memory at s = {scale}", "at most", MEMORY_SHARE).verdict(share))
        with_weights = (memory["package"] + figures["folded_mib"]) / memory["straightforward"]
        verdicts.append(f"- memory at s = {scale} with the folded weights counted in: {with_weights:.3f}")
    assert figures["folded_mib"], "the projector did not fold its weights unasked"
    verdicts.append(f"- the folded weights, kept between calls: {figures['folded_mib']:.0f} MiB")
    report(figures, head, rows, verdicts, file)


if __name__ == "__main__":
    main()
