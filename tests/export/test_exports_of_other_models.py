"""Whole exports: other models, runtimes and precisions, and 200 questions."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tokenpacker.export import ExportedAnswerer, agreement, compare_answers
from tokenpacker.export.agreement import answer_by_torch
from tokenpacker.hf import TokenPackerProcessor
from tokenpacker.projectors import RECOMMENDED_TOKEN_PACKER

pytestmark = pytest.mark.slow

LET_GO = """
import signal, sys
from tokenpacker.export import ExportedAnswerer

first, second = (ExportedAnswerer(sys.argv[1], num_threads=1) for _ in range(2))
del first, second
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("heard")
"""
TWO_THREADS = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
import openvino
from tokenpacker.export import ExportedAnswerer

Core, made = openvino.Core, []

def slow():
    made.append(Core())
    time.sleep(0.5)
    return made[-1]

openvino.Core = slow
with ThreadPoolExecutor(2) as pool:
    list(pool.map(lambda _: ExportedAnswerer(sys.argv[1], num_threads=1), range(2)))
print(len(made))
"""


@pytest.fixture(scope="module")
def openvino_folder(carried, export, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "tiny-openvino"
    export(*carried, folder, to="openvino", scale_factors=(2, 3, 4))
    return folder


@pytest.fixture(scope="module")
def answered_once():
    """Torch's answers are the same for both runtimes, and are half of the work of a comparison."""
    known = {}

    def remembered(model, inputs, end_ids):
        key = b"".join(value.tobytes() for value in inputs.values())
        if key not in known:
            known[key] = answer_by_torch(model, inputs, end_ids)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "answer_by_torch", remembered)
        yield


@pytest.mark.usefixtures("answered_once")
def test_200_answers_of_onnx_runtime_equal_those_of_torch(answerer, carried):
    found = compare_answers(carried[0], answerer, 200)
    assert (found.equal_answers, found.equal_tokens) == (200, found.tokens)


@pytest.mark.usefixtures("answered_once")
def test_200_answers_of_openvino_equal_those_of_torch(openvino_folder, carried):
    assert {path.suffix for path in (openvino_folder / "openvino").iterdir()} == {".xml", ".bin"}
    found = compare_answers(carried[0], ExportedAnswerer(openvino_folder, num_threads=1), 200)
    assert (found.equal_answers, found.equal_tokens) == (200, found.tokens)


def test_a_process_that_let_openvino_go_survives_a_signal(openvino_folder):
    command = [sys.executable, "-c", LET_GO, str(openvino_folder)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "heard\n"), ended.stderr


def test_two_threads_that_open_the_first_export_share_one_core(openvino_folder):
    command = [sys.executable, "-c", TWO_THREADS, str(openvino_folder)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "1\n"


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_int8_is_a_third_of_the_size_and_answers(carried, export, tmp_path, to):
    manifest = export(*carried, tmp_path / "int8", to=to, quantize="int8")
    weights = [path for path in (tmp_path / "int8" / to).iterdir() if path.suffix in (".onnx", ".bin")]
    assert all("_quantized" in path.name for path in weights)
    assert sum(path.stat().st_size for path in weights) < 0.4 * 4 * sum(w.numel() for w in carried[0].parameters())
    assert manifest.quantization == "int8"
    found = compare_answers(carried[0], ExportedAnswerer(tmp_path / "int8", num_threads=1), 16)
    assert found.equal_tokens > 0.6 * found.tokens  # chance is a hundredth


@pytest.mark.parametrize(
    "parts",
    [
        {"vision": "siglip", "text": "qwen2", "tied": True, "projector_config": {"name": "mlp"}},
        {"projector_config": {"name": "resampler", "query_grid": [2, 2], "num_heads": 4}},
        {"projector_config": {**RECOMMENDED_TOKEN_PACKER, "num_heads": 4}},
    ],
    ids=["siglip-qwen2-mlp", "clip-llama-resampler", "clip-llama-token-packer-recommended"],
)
def test_other_towers_projectors_and_language_models_are_exported(
    make_tiny_model, tiny_tokenizer, export, tmp_path, image_of, parts
):
    model = make_tiny_model(**parts).eval()
    processor = TokenPackerProcessor.from_config(model.config, tiny_tokenizer)
    export(model, processor, tmp_path / "out", to="onnx", external_bytes=0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["transformers.js_config"]["use_external_data_format"]["vision_encoder.onnx"] == 1
    answerer = ExportedAnswerer(tmp_path / "out", num_threads=1)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    inputs = answerer.prepare(messages, [image_of(60, 90)])
    assert list(answerer.generate(inputs, 16)) == answer_by_torch(model, inputs, answerer.end_ids)
