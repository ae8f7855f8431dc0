"""What `tokenpacker compare` is asked for to a comparison: defaults of the tiny recipes, and their foundation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tokenpacker.compare.common_parts import Foundation, make_foundation
from tokenpacker.compare.runs import TINY, Comparison
from tokenpacker.speed.machine import usable_cores

STEPS, SEEDS = (400, 500), (0, 1, 2)  # 45 runs of the tiny recipes finish within four hours on two idle cores
QUICK_STEPS, QUICK_SEEDS, QUICK_LANGUAGE_STEPS, QUICK_LIMIT = (40, 50), (0,), 100, 300  # a quarter of an hour


def prepare(
    settings: dict[str, Any], output: Path, foundation: Path | None = None, jobs: int | None = None
) -> tuple[Comparison, int]:
    """The comparison and how many runs go side by side. The foundation is made if it is not there.

    Args:
        settings: fields of `Comparison`; what is missing or None gets the default.
        foundation: folder with a finished one; None makes one below `output`.

    Raises:
        ValueError: for settings that do not fit together, before the foundation is made.
    """
    quick, tiny = settings.get("quick", False), settings.get("recipe", TINY) == TINY
    steps = (None, None) if not tiny else QUICK_STEPS if quick else STEPS
    asked = settings.get("steps", (None, None))
    settings = settings | {"steps": tuple(one or default for one, default in zip(asked, steps, strict=True))}
    settings["seeds"] = settings.get("seeds") or (QUICK_SEEDS if quick else SEEDS)
    settings["limit"] = settings.get("limit") or (QUICK_LIMIT if quick and tiny else None)
    jobs = jobs or (1 if torch.cuda.is_available() or not tiny else usable_cores())
    if not tiny:
        for name, given in (("--foundation", foundation is not None), ("--quick", quick)):
            if given:
                raise ValueError(f"{name} belongs to the tiny recipes; leave it out, or leave --recipe out")
        return Comparison(**settings), jobs
    Comparison(**settings)  # checks the settings
    if foundation is not None:
        parts = Foundation.find(foundation)
    else:
        name, language_steps = ("foundation-quick", QUICK_LANGUAGE_STEPS) if quick else ("foundation", None)
        parts = make_foundation(output / name, language_steps=language_steps)
    comparison = Comparison(
        vision_tower=str(parts.encoder),
        language_model=str(parts.language_model),
        foundation=parts.digest,
        num_workers=0
        if jobs > 1
        else None,  # measured: as many runs as cores, each drawing its own pictures, is fastest
        **settings,
    )
    return comparison, jobs
