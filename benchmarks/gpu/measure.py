"""One part of the GPU benchmark, in a process of its own: `python -m benchmarks.gpu.measure SETTINGS`, as JSON."""

from __future__ import annotations

import json
import sys
from importlib import import_module

import torch

from benchmarks.gpu.run import Run

TRAINING = ("training", "fsdp2")


def main() -> None:
    """Measures the part that the settings name; what a part needs alone is imported for it alone."""
    run = Run.of(json.loads(sys.argv[1]))
    torch.manual_seed(0)
    try:
        module = import_module(f"benchmarks.gpu.{'training' if run.part in TRAINING else 'inference'}")
        getattr(module, run.part.replace("-", "_"))(run)
    except Exception as error:
        run.failed(run.part, error)


if __name__ == "__main__":
    main()
