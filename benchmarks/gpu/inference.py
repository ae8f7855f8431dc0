"""The parts of the GPU benchmark that train nothing: tests, projector, model, loading in four bits."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import ROOT
from benchmarks.gpu.run import Run, capture, peak_mib, time_in_turns
from benchmarks.projector import PATCH_GRID, SCALE_FACTORS, Straightforward
from benchmarks.side_by_side import MIB, median_ratio
from tokenpacker import TokenPacker, TokenPackerProjectorConfig, VisionFeatures
from tokenpacker.hf import TokenPackerForConditionalGeneration, four_bit_config
from tokenpacker.speed.memory import FOUR_BIT, needed_memory, random_model
from tokenpacker.speed.model_sizes import Candidate, candidates
from tokenpacker.speed.speed_report import Protocol
from tokenpacker.speed.speed_run import measure

TOLERANCE = 0.04  # of the largest value: several roundings of bfloat16 in a row
MODES = (("plain", "CUDA graph"), ("compiled", "compiled, CUDA graph"))
TESTS = ROOT / "tests"
FOUR_BIT_LAYERS = 4  # of the 32: enough to see what a layer takes, and soon written
Pass = Callable[[VisionFeatures, int], Tensor]


def tests(run: Run) -> None:
    """The tests that are marked for a GPU, in this process: what they came to is written after each."""
    import pytest

    row: dict[str, Any] = {"passed": 0, "failed": {}, "skipped": {}}
    run.found["rows"].append(row)

    class Outcomes:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed or report.skipped:
                crash = getattr(report.longrepr, "reprcrash", None)  # none where a file could not be imported
                text = report.longrepr[-1] if report.skipped else crash.message if crash else report.longreprtext
                row["failed" if report.failed else "skipped"][report.nodeid] = " ".join(text.split())[:200]
            elif report.when == "call":
                row["passed"] += 1
            run.write()

        pytest_collectreport = pytest_runtest_logreport

    os.environ["GPU_TESTS_DEVICE"] = str(run.device)
    marked = [str(path) for path in sorted(TESTS.rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    status = pytest.main(["-m", "gpu", "-p", "no:cacheprovider", *marked], plugins=[Outcomes()])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        run.note(f"pytest ended with {status!r}")


def projector(run: Run) -> None:
    """TokenPacker against the straightforward module, each mode of one against the same mode of the other."""
    vision_dim, language_dim = (64, 64) if run.small else (1024, 4096)
    packer = TokenPacker(TokenPackerProjectorConfig(vision_dim=vision_dim, language_dim=language_dim))
    straightforward = Straightforward(packer).to(run.device, torch.bfloat16)  # the packer is a part of it
    passes: dict[str, Pass] = {
        "straightforward": lambda features, scale: straightforward(features.query, features.levels, scale),
        "package": packer,
    }
    weights = list(straightforward.parameters())
    for modes in MODES:  # what needs no compiler first: it takes the least time
        for scale in SCALE_FACTORS[: 1 if run.small else None]:
            for batch in (1,) if run.small else (1, 64):
                shape = batch, PATCH_GRID[0] * PATCH_GRID[1]
                query, levels = (
                    torch.randn(*shape, width, device=run.device, dtype=torch.bfloat16)
                    for width in (vision_dim, 4 * vision_dim)
                )
                features = VisionFeatures(query, levels, PATCH_GRID)
                for backward in (False, True):
                    what = f"s={scale}, batch {batch}, {'forward + backward' if backward else 'forward'}, {modes[0]}"
                    learning = weights if backward else []
                    run.attempt(what, partial(_projector_row, run, passes, features, scale, learning, modes))


def _projector_row(
    run: Run,
    passes: dict[str, Pass],
    features: VisionFeatures,
    scale: int,
    learning: list[torch.nn.Parameter],
    modes: tuple[str, str],
) -> dict[str, Any]:
    """Both modules in the first mode, and captured in CUDA graphs where there are any."""
    with torch.no_grad():
        expected, packed = (each(features, scale) for each in passes.values())
    difference = ((packed - expected).abs().max() / expected.abs().max()).item()
    if not difference < TOLERANCE:
        raise ValueError(f"the two modules differ by {difference:.3f} of the largest value")
    if modes[0] == "compiled":
        torch.compiler.reset()  # else the ninth shape would silently not be compiled
        backend = "inductor" if run.device.type == "cuda" else "eager"
        passes = {name: torch.compile(each, dynamic=False, backend=backend) for name, each in passes.items()}
    towards = torch.randn_like(packed)
    calls = {name: partial(_pass, each, features, scale, learning, towards) for name, each in passes.items()}
    row: dict[str, Any] = {"batch": len(towards), "scale_factor": scale, "backward": bool(learning)}
    row |= {"difference": difference, "modes": {}}
    for mode in modes if run.device.type == "cuda" else modes[:1]:
        if mode == modes[1]:
            calls = {name: capture(call) for name, call in calls.items()}
        times = time_in_turns(calls, 3 if run.small else 9, run.device)
        row["modes"][mode] = {"times": times, "speedup": median_ratio(times, *passes, "device_ms")}
        if mode == modes[0]:
            row["modes"][mode]["peak_mib"] = {name: peak_mib(call, run.device) for name, call in calls.items()}
    return row


def _pass(
    forward: Pass, features: VisionFeatures, scale: int, learning: list[torch.nn.Parameter], towards: Tensor
) -> Any:
    """(N, T, D), or the gradients where something learns."""
    if learning:
        return torch.autograd.grad(forward(features, scale), learning, towards, allow_unused=True)
    with torch.no_grad():
        return forward(features, scale)


def model(run: Run) -> None:
    """Vision, projector, first token and further tokens, and memory, at 576, 144, 64 and 36 tokens; then in HD."""
    shapes = run.shapes()
    built = random_model(shapes.config, torch.bfloat16, run.device)
    own, mlp = shapes.config.projector, candidates(shapes)[-1]
    asked = [mlp, *(Candidate(config=own, scale_factor=scale, trained=True) for scale in SCALE_FACTORS)]
    side = shapes.config.tile_size[0]
    lengths = {"output_tokens": 2, "rounds": 1, "warm_up": 1} if run.small else {"output_tokens": 32, "rounds": 5}

    def row(image_size: tuple[int, int] | None) -> dict[str, Any]:
        protocol = Protocol(image_size=image_size, batch_sizes=(1,), **lengths)
        sized = replace(shapes, sliced=image_size is not None)
        report = measure(sized, asked, protocol, run.device, "bfloat16", load=lambda: built)
        return report.to_dict()

    run.attempt("an image of one tile", lambda: row(None))
    run.attempt("an image of nine tiles and a thumbnail", lambda: row((3 * side, 3 * side)))


def four_bit(run: Run) -> None:
    """A model that is loaded whole and in four bits: what its weights take, beside what was planned, and an answer."""
    shapes = run.shapes(FOUR_BIT_LAYERS)
    with tempfile.TemporaryDirectory() as folder:
        random_model(shapes.config, torch.bfloat16, run.device).save_pretrained(folder)
        run.free()

        def row(dtype: str, **quantization: Any) -> dict[str, Any]:
            begin = time.time()
            loaded = TokenPackerForConditionalGeneration.from_pretrained(
                folder, dtype=torch.bfloat16, device_map={"": run.device}, **quantization
            ).eval()
            seconds = time.time() - begin
            needed = needed_memory(shapes, candidates(shapes)[:1], Protocol(), dtype).weights
            ids = torch.ones(1, 64, dtype=torch.long, device=run.device)
            with torch.inference_mode():
                logits = loaded(input_ids=ids).logits
            return {
                "weights": dtype,
                "load_s": seconds,
                "weights_mib": sum(weight.nbytes for weight in loaded.parameters()) / MIB,
                "planned_mib": needed / MIB,
                "finite": bool(torch.isfinite(logits).all()),
            }

        run.attempt("whole", lambda: row("bfloat16"))
        run.attempt("in four bits", lambda: row(FOUR_BIT, quantization_config=four_bit_config()))
