"""One export of the carried model for all tests that read it: tracing takes many seconds."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from importlib.util import find_spec

import pytest
from filelock import FileLock

from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor, carried_model_path
from tokenpacker.hf.versions import HAS_EXPORTERS

FACTORS = (2, 3, 4)


@pytest.fixture(scope="session")
def carried():
    folder = carried_model_path()
    model = TokenPackerForConditionalGeneration.from_pretrained(folder).eval()
    return model, TokenPackerProcessor.from_pretrained(folder)


@pytest.fixture(scope="session")
def export():
    """Exports quietly: torch's exporter prints, and warns of its own deprecated names."""
    if not HAS_EXPORTERS:
        pytest.skip("transformers before 5.24 has no exporters that give these graphs")
    for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    from tokenpacker.export import export_model

    def quietly(*args, **kwargs):
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            return export_model(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CI", "true")  # else OpenVINO's converter sends statistics of use
        yield quietly


@pytest.fixture(scope="session")
def onnx_folder(carried, export, tmp_path_factory):
    """The carried model as ONNX, at all its scale factors; one process of pytest-xdist makes it, and all read it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / "tiny-onnx"
    with FileLock(shared / "tiny-onnx.lock"):
        if not folder.exists():  # it appears when it is complete
            export(*carried, folder, to="onnx", scale_factors=FACTORS)
    return folder


@pytest.fixture(scope="session")
def answerer(onnx_folder):
    from tokenpacker.export import ExportedAnswerer

    return ExportedAnswerer(onnx_folder, num_threads=1)
