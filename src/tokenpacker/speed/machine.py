"""What was measured on: hardware, versions and attention kernels, memory that is free, memory that a call took."""

from __future__ import annotations

import contextlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

PROBE_LENGTH = 16  # tokens that suffice to see which kernel attention takes
LIBRARIES = ("torch", "transformers", "tokenpacker", "bitsandbytes")
CPU_INFO, MEMORY_INFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")
PROCESS_STATUS, PROCESS_RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # what the kernel wants written to forget a process's peak; see proc(5)


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
    return {
        "device": str(device),
        **gpu,
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory("MemTotal"),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **_versions()},
    }


def usable_cores() -> int:
    """Those that this process may run on, which a container can hold fewer of than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated; None where nothing tells."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _memory("MemAvailable")


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all that it was told to; on all GPUs, for a model may be spread over them."""
    if device.type == "cuda":
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)
    elif device.type == "mps":
        torch.mps.synchronize()


@torch.no_grad()  # not inference mode, in which an operation does not show what it consists of
def attention_kernels(model: PreTrainedModel) -> list[str]:
    """The fused attention kernels that torch takes for a tile and for a prompt; none where it multiplies matrices."""
    dtype, device = model.model.vision_tower.dtype, model.device
    tile = torch.randn(1, 3, *model.config.tile_size, device=device, dtype=dtype)
    prompt = torch.ones(1, PROBE_LENGTH, dtype=torch.long, device=device)
    with _AttentionSeen() as seen:
        model.model.vision_tower(tile)
        model.model.language_model(input_ids=prompt)
    return sorted(seen.names)


class PeakMemory:
    """The most memory that was in use since `start`, of one kind that `kind` names."""

    def __init__(self, device: torch.device):
        self.device = device

    @property
    def kind(self) -> str:
        """What is measured."""
        if self.device.type == "cuda":
            return "allocated by torch on the device, weights included"
        return "resident memory of the whole process, libraries and weights included"

    def start(self) -> bool:
        """Forgets earlier peaks; whether that is possible here."""
        if self.device.type == "cuda":
            for index in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(index)
            return True
        try:
            PROCESS_RESET.write_text(RESET_PEAK)
        except OSError:
            return False
        return True

    def stop(self) -> int | None:
        """Bytes at the peak; None where nothing tells."""
        if self.device.type == "cuda":
            return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
        return _field(PROCESS_STATUS, "VmHWM")


class _AttentionSeen(TorchDispatchMode):
    """Notes the names of operations that are attention."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        if "attention" in name or "flash_attn" in name:
            self.names.add(name)
        return func(*args, **(kwargs or {}))


def _processor_name() -> str:
    """The processor's product name where the system tells it, else its architecture."""
    if CPU_INFO.is_file():
        for line in CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):  # a checkout that was not installed has none of its own
            found[library] = version(library)
    return found


def _memory(name: str) -> int | None:
    return _field(MEMORY_INFO, name)


def _field(file: Path, name: str) -> int | None:
    """Bytes in a line `name: 123 kB`."""
    try:
        lines = file.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    line = next((line for line in lines if line.startswith(f"{name}:")), None)
    return None if line is None else int(line.split()[1]) * 1024
