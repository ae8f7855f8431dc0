"""`tokenpacker export`: what is refused before a model is loaded, and one whole run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tokenpacker.cli.model_files import find_model
from tokenpacker.hf.versions import HAS_EXPORTERS

TINY = ("export", "tiny")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("out",), "missing option '--to'"),
        (("out", "--to", "tflite"), "'tflite'"),
        (("out", "--to", "onnx", "--quantize", "int4"), "'int4'"),
        (("out", "--to", "onnx", "--scale-factor", "2;3"), "--scale-factor '2;3' must be whole numbers"),
        (("out", "--to", "onnx", "--questions", 9), "--questions belongs to --check; give both, or leave it out"),
        (("full", "--to", "onnx"), "full exists already; choose another folder, or pass --overwrite"),
    ],
)
def test_wrong_options_are_refused_in_one_line(one_line_error, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    assert message in one_line_error(*TINY, *words)


@pytest.fixture
def unloaded(monkeypatch):
    """Fails a test that loads a model."""
    monkeypatch.setattr("tokenpacker.cli.commands.serving.export.load_model", lambda *_: pytest.fail("it loads"))


@pytest.mark.parametrize("out", ["models/mine", "models/mine/", "models/../models/mine", "models", "link"])
@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_the_model_that_is_exported_is_never_replaced(one_line_error, tmp_path, monkeypatch, unloaded, out, overwrite):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(find_model(None), "models/mine")
    shutil.copy("models/mine/config.json", "models")  # so that it may be replaced
    Path("link").symlink_to("models/mine", target_is_directory=True)
    weights = Path("models/mine/model.safetensors").read_bytes()
    message = one_line_error("export", "models/mine", out, "--to", "onnx", *overwrite)
    assert message.endswith("models/mine, which is read; choose another folder to write")
    assert Path("models/mine/model.safetensors").read_bytes() == weights


def test_a_model_of_the_package_is_never_replaced(one_line_error, tmp_path, monkeypatch, unloaded):
    carried = shutil.copytree(find_model(None), tmp_path / "carried")
    monkeypatch.setattr("tokenpacker.cli.commands.serving.export.find_model", lambda _: carried)
    message = one_line_error(*TINY, carried, "--to", "onnx", "--overwrite")
    assert message == f"{carried} holds {carried}, which is read; choose another folder to write"


def test_a_model_in_4_bit_is_refused_before_it_is_loaded(one_line_error, tmp_path):
    config = json.loads((find_model(None) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    message = one_line_error("export", tmp_path, tmp_path / "out", "--to", "onnx")
    assert "is quantized and cannot be exported; give the original, with --quantize int8" in message


@pytest.mark.skipif(not HAS_EXPORTERS, reason="transformers before 5.24 has no exporters that give these graphs")
def test_a_scale_factor_beyond_the_grid_is_refused_before_the_model_is_loaded(one_line_error, tmp_path):
    pytest.importorskip("onnxscript")
    message = one_line_error(*TINY, tmp_path / "out", "--to", "onnx", "--scale-factor", "2,13")
    assert message == "scale_factor=13 exceeds patch_grid=12x12; use at most 12"
    assert list(tmp_path.iterdir()) == []


def test_an_export_given_to_ask_is_told_what_answers_from_it(one_line_error, tmp_path, picture):
    folder = tmp_path / "exported"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "tokenpacker"}')
    (folder / "export.json").write_text("{}")
    message = one_line_error("ask", picture, "what?", "--model", folder)
    assert "is an export for another runtime; tokenpacker.export.ExportedAnswerer answers from it" in message


@pytest.mark.slow
@pytest.mark.skipif(not HAS_EXPORTERS, reason="transformers before 5.24 has no exporters that give these graphs")
@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's, about names of its own
def test_a_model_with_regions_is_exported_without_them_and_checked(run, tmp_path):
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    result = run("export", "tiny-regions", tmp_path / "out", "--to", "onnx", "--check", "--questions", 8, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)  # nothing else is on standard output
    assert "the region encoder is not exported" in result.stderr
    assert told["scale_factors"] == [2]
    assert told["check"]["questions"] == told["check"]["equal_answers"] == 8
    assert told["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out" / "onnx").iterdir())
