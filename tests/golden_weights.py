"""Seeded weights and inputs of the golden data, by the rule that its README gives.

`python golden_weights.py OUT CASE...` writes what our projector makes of them: see `run_golden_cases`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tokenpacker import TokenPacker, TokenPackerProjectorConfig, VisionFeatures

# (pattern of a tensor's name, mean, standard deviation); the first match counts.
PROJECTOR_RULES = [(r"bias$", 0.0, 0.02), (r"ln_[qkv]_1\.weight$", 1.0, 0.1), (r"", 0.0, 0.05)]

# Our parameter names and those of the original projector; the attention's input projections are one tensor there.
NAMES = {
    "query_proj": "q_proj_1",
    "query_norm": "ln_q_1",
    "key_mlp": "k_proj_1",
    "key_norm": "ln_k_1",
    "value_mlp": "v_proj_1",
    "value_norm": "ln_v_1",
    "attention.output_proj": "clip_attn.out_proj",
    "output_mlp": "mlp",
}
INPUT_PROJECTIONS = ("attention.query_proj", "attention.key_proj", "attention.value_proj")

# The golden data come from a processor with AVX2. oneDNN has another GELU for AVX-512, and that alone takes the
# original's own operations 2e-5 away from its stored results (values reach 44). These variables choose AVX2 kernels.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


def seeded(name: str, shape: tuple[int, ...], mean: float = 0.0, std: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) & 0x7FFFFFFF)
    return mean + torch.randn(shape, generator=generator) * std


def original_names(packer: TokenPacker, value: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """`value` of every parameter under the original's names."""
    named = {}
    for name, parameter in packer.named_parameters():
        part = next((ours for ours in NAMES if name.startswith(f"{ours}.")), None)
        if part:
            named[name.replace(part, NAMES[part], 1)] = value(parameter)
    for kind in ("weight", "bias"):
        parts = [value(packer.get_parameter(f"{part}.{kind}")) for part in INPUT_PROJECTIONS]
        named[f"clip_attn.in_proj_{kind}"] = torch.cat(parts)
    return named


def golden_packer(case: str) -> TokenPacker:
    """The projector of a golden case such as `s2_h64`."""
    scale, width = (int(number) for number in re.fullmatch(r"s(\d)_h(\d+)", case).groups())
    packer = TokenPacker(TokenPackerProjectorConfig(vision_dim=1024, language_dim=width, scale_factor=scale))
    weights = original_names(packer, lambda parameter: parameter)
    for name in weights:
        full_name = f"model.mm_projector.{name}"
        mean, std = next((mean, std) for pattern, mean, std in PROJECTOR_RULES if re.search(pattern, full_name))
        weights[name] = seeded(full_name, tuple(weights[name].shape), mean, std)
    with torch.no_grad():
        for ours, theirs in NAMES.items():
            for name, parameter in packer.get_submodule(ours).named_parameters():
                parameter.copy_(weights[f"{theirs}.{name}"])
        for kind in ("weight", "bias"):
            for part, chunk in zip(INPUT_PROJECTIONS, weights[f"clip_attn.in_proj_{kind}"].chunk(3), strict=True):
                packer.get_parameter(f"{part}.{kind}").copy_(chunk)
    return packer


def golden_features(case: str) -> VisionFeatures:
    return VisionFeatures(
        seeded(f"projector/{case}/x", (2, 576, 1024)), seeded(f"projector/{case}/x_multi", (2, 576, 4096)), (24, 24)
    )


def run_golden_cases(cases: list[str], out: Path) -> dict[str, dict[str, Tensor]]:
    """Per case `out` (N, T, D) and, under the original's names, the gradients of the mean of its squares.

    A process of its own computes them: the libraries read which processor to serve once, before their first use.
    """
    subprocess.run([sys.executable, __file__, str(out), *cases], env=os.environ | AVX2, check=True)
    return torch.load(out)


def main(out: str, *cases: str) -> None:
    results = {}
    for case in cases:
        packer = golden_packer(case)
        packed = packer(golden_features(case))
        packed.square().mean().backward()
        results[case] = {"out": packed.detach()} | original_names(packer, lambda parameter: parameter.grad)
    torch.save(results, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
