"""Exports that are refused before anything is traced, and exports that end halfway."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from tokenpacker.export import exporting, writers


def untraced(monkeypatch):
    """Fails a test that begins to trace."""

    def fail(*_):
        raise AssertionError("it began to trace")

    monkeypatch.setattr(writers.OnnxWriter, "write", fail)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ((13,), "scale_factor=13 exceeds patch_grid=12x12; use at most 12"),
        ((2, 3, 2), "scale factor 2 is given twice; give each one once"),
    ],
)
def test_scale_factors_that_do_not_fit_are_refused(carried, export, tmp_path, monkeypatch, factors, message):
    untraced(monkeypatch)
    with pytest.raises(ValueError, match=message):
        export(*carried, tmp_path / "out", to="onnx", scale_factors=factors)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_empty_is_refused(carried, export, tmp_path, monkeypatch):
    untraced(monkeypatch)
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="exists already; choose another folder, or pass --overwrite"):
        export(*carried, tmp_path, to="onnx")
    with pytest.raises(ValueError, match="is no model's folder and is not replaced"):
        export(*carried, tmp_path, to="onnx", overwrite=True)


def test_an_export_never_replaces_the_model_that_it_reads(carried, export, tmp_path, monkeypatch):
    untraced(monkeypatch)
    source = tmp_path / "models" / "mine"
    source.mkdir(parents=True)
    for folder in (source, source.parent):
        (folder / "config.json").write_text("{}")
        with pytest.raises(ValueError, match=r"holds .*mine, which is read; choose another folder to write"):
            export(*carried, folder, to="onnx", overwrite=True, sources=[source])
    assert (source / "config.json").read_text() == "{}"


def test_another_precision_is_refused(make_tiny_model, tmp_path, export):
    model = make_tiny_model().to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"is torch.bfloat16 on cpu, but a model is exported from float32 on the CPU"):
        export(model, None, tmp_path / "out", to="onnx")


def test_a_quantized_model_is_refused(make_tiny_model, tmp_path, export):
    model = make_tiny_model()
    model.config.quantization_config = {"load_in_4bit": True}
    with pytest.raises(ValueError, match="the model is quantized and cannot be exported"):
        export(model, None, tmp_path / "out", to="onnx")


@pytest.mark.parametrize(("to", "quantize", "package"), [("onnx", None, "onnxscript"), ("openvino", "int8", "nncf")])
def test_a_missing_package_is_named_with_its_remedy(monkeypatch, to, quantize, package):
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if name == package else True)
    with pytest.raises(
        ImportError, match=rf"exporting to {to} needs {package}; run: pip install 'tokenpacker\[export\]'"
    ):
        exporting.require_packages(to, quantize)


def test_a_transformers_without_exporters_is_named(monkeypatch):
    monkeypatch.setattr(exporting, "find_spec", lambda name: True)
    monkeypatch.setattr(exporting, "HAS_EXPORTERS", False)
    with pytest.raises(ImportError, match=r"exporting needs transformers 5.24 or later, but .* is installed"):
        exporting.require_packages("openvino")


def test_an_export_that_fails_leaves_nothing(carried, export, tmp_path):
    def stop(done, total, name):
        if done == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(*carried, tmp_path / "new" / "out", to="onnx", progress=stop)
    assert list(tmp_path.iterdir()) == []
    assert carried[0].model.language_model.config._attn_implementation == "sdpa"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="only POSIX can kill without notice")
def test_a_killed_export_leaves_nothing_that_looks_finished(export, tmp_path):
    command = [sys.executable, "-m", "tokenpacker", "export", "tiny", str(tmp_path / "out"), "--to", "onnx"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    partial = tmp_path / ".out.partial" / "onnx"
    try:
        while not partial.exists() and process.poll() is None:
            time.sleep(0.05)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "out").exists()
    assert os.listdir(tmp_path / ".out.partial") == ["onnx"]
