"""The machine of a measurement: hardware, versions and attention kernels."""

from __future__ import annotations

import contextlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil  # comes with accelerate
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

PROBE_LENGTH = 16  # tokens of the prompt that shows which attention kernel is used
LIBRARIES = ("torch", "transformers", "tokenpacker", "bitsandbytes")
CPU_INFO = Path("/proc/cpuinfo")


def best_device() -> torch.device:
    """A GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Hardware, threads and versions, JSON-ready."""
    gpu: dict[str, Any] = {}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "gpus": torch.cuda.device_count(),
            "cuda": torch.version.cuda or torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
        }
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):  # a checkout that is not installed has no version
            versions[library] = version(library)
    return {
        "device": str(device),
        **gpu,
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
    }


def machine_text(machine: dict[str, Any]) -> str:
    """A description in one line: the GPU or the processor, cores and threads."""
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    return f"{machine.get('gpu') or machine['processor']}, {machine['cores']} cores, {threads}"


def versions_text(machine: dict[str, Any]) -> str:
    """The versions of a description in one line."""
    return ", ".join(f"{name} {number}" for name, number in machine["versions"].items())


def usable_cores() -> int:
    """Cores that this process may use; in a container these can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@torch.no_grad()  # not inference mode, which hides the operations that a call consists of
def attention_kernels(model: PreTrainedModel) -> list[str]:
    """The fused attention kernels that torch chooses for a tile and a prompt; empty for plain matrix products."""
    dtype, device = model.model.vision_tower.dtype, model.device
    tile = torch.randn(1, 3, *model.config.tile_size, device=device, dtype=dtype)
    prompt = torch.ones(1, PROBE_LENGTH, dtype=torch.long, device=device)
    with _AttentionSeen() as seen:
        model.model.vision_tower(tile)
        model.model.language_model(input_ids=prompt)
    return sorted(seen.names)


class _AttentionSeen(TorchDispatchMode):
    """Collects the names of attention operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        if "attention" in name or "flash_attn" in name:
            self.names.add(name)
        return func(*args, **(kwargs or {}))


def _processor_name() -> str:
    """The product name where the system tells it (`platform` does not on Linux), else the architecture."""
    if CPU_INFO.is_file():
        for line in CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
