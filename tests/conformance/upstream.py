"""transformers' own common tests as modules, with stand-ins for what the source archive lacks."""

from __future__ import annotations

import functools
import importlib
import sys
import types
import unittest
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from conformance.fetch import CACHE, PACKAGE, VERSION

MARKERS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "is_fsdp_test",
    "is_tensor_parallel_test",
    "torch_compile_test",
)


def common_tests(name: str) -> types.ModuleType:
    """One of their test modules; skips the module that asks where the tests were not fetched."""
    if not (CACHE / PACKAGE).is_dir():
        pytest.skip(
            f"the tests of transformers {VERSION} are not here; `make test-conformance` fetches and runs them",
            allow_module_level=True,
        )
    _install()
    return importlib.import_module(f"{PACKAGE}.{name}")


class Conformance(unittest.TestCase):
    """A failing sub-test fails its test at once, and a sub-test that skips skips only itself."""

    def subTest(self, *args: Any, **kwargs: Any) -> Any:
        return suppress(unittest.SkipTest)


@functools.cache
def _install() -> None:
    sys.path.insert(0, str(CACHE))
    _stand_in("exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    _stand_in("generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    _stand_in("utils.test_configuration_utils", config_common_kwargs={})  # they are for configs without sub-configs
    _stand_in("distributed_testing_utils", run_distributed=None)
    helper = types.ModuleType("fetch_hub_objects_for_ci")
    helper.url_to_local_path = _local_picture  # type: ignore[attr-defined]
    sys.modules[helper.__name__] = helper


def _stand_in(name: str, **content: Any) -> None:
    module = types.ModuleType(f"{PACKAGE}.{name}")
    module.__dict__.update(content)
    sys.modules[module.__name__] = module
    if "." in name:
        parent = types.ModuleType(module.__name__.rpartition(".")[0])
        parent.__path__ = []
        sys.modules[parent.__name__] = parent


def _local_picture(url: str) -> str:
    """A picture for a picture's address: their tests take theirs from the hub."""
    if not url.endswith((".png", ".jpg")):
        return url
    path = CACHE / f"picture{Path(url).suffix}"
    if not path.exists():
        Image.radial_gradient("L").resize((640, 480)).convert("RGB").save(path)
    return str(path)
