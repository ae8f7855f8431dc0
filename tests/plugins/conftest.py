"""vLLM runs in an environment of its own: `make test-vllm`."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # an engine in this process starts in seconds
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
HAS_VLLM = find_spec("vllm") is not None
if HAS_VLLM:
    os.environ.update(SETTINGS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent and item.path.name.startswith("test_vllm"):
            item.add_marker(pytest.mark.filterwarnings("ignore::FutureWarning"))  # of torch, which vLLM looks through
            if not HAS_VLLM:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed; run `make test-vllm`"))
