"""The model in engines that know nothing of this package: transformers' server, its exporters, its Trainer, vLLM.

vLLM does not run here; what its Transformers backend asks of a processor and a model is asked the same way.
"""

from __future__ import annotations

import base64
import copy
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.exporters import exporter_dynamo as exporters
from transformers.exporters.utils import decompose_multimodal, get_leaf_tensors
from transformers.utils.import_utils import is_serve_available

from tokenpacker.hf import TokenPackerProcessor, carried_model_path
from tokenpacker.plugins.vllm_plugin import register

ROOT = Path(__file__).resolve().parents[2]
SIGN = ROOT / "docs" / "images" / "sign.png"


@pytest.fixture(scope="module")
def sliced_processor(tiny_model, tiny_tokenizer):
    return TokenPackerProcessor.from_config(tiny_model.config, tiny_tokenizer, image_mode="slice", max_tiles=4)


@pytest.fixture
def inputs(sliced_processor, image_of):
    """Two prompts with one image each, of three tiles and of one."""
    images = [[image_of(32, 64)], [image_of(32, 32, 1)]]
    return dict(sliced_processor(images, ["<image>\nhi", "<image>\nyo"], return_tensors="pt"))


@pytest.fixture
def model_without_chunks(tiny_model, monkeypatch):
    monkeypatch.setattr(tiny_model.model, "vision_chunk_tiles", None)
    return tiny_model


# torch.export and transformers' exporters


class ImagePart(torch.nn.Module):
    """Tiles to packed tokens: vision tower and projector."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model.get_image_features(pixel_values).pooler_output


def test_tower_and_projector_are_exported_for_any_number_of_tiles(model_without_chunks):
    tiles = {0: torch.export.Dim("tiles", min=1, max=64)}
    part = ImagePart(model_without_chunks)
    program = torch.export.export(part, (torch.randn(3, 3, 32, 32),), dynamic_shapes=(tiles,)).module()
    for num_tiles in (1, 40):
        pixels = torch.randn(num_tiles, 3, 32, 32)
        torch.testing.assert_close(program(pixels), part(pixels))


@pytest.mark.parametrize("given", [{}, {"scale_factor": 2}], ids=["the projector's own", "as a number"])
def test_an_exported_model_has_one_scale_factor_and_refuses_others(model_without_chunks, inputs, given):
    inputs["use_cache"] = False  # torch knows no cache as an output
    program = torch.export.export(model_without_chunks, (), inputs | given).module()
    torch.testing.assert_close(program(**inputs, **given).logits, model_without_chunks(**inputs).logits)
    with pytest.raises(RuntimeError):
        program(**(inputs | {"scale_factors": inputs["scale_factors"] * 2}), **given)


@pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")  # by transformers, of torch
@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_transformers_exporters_find_and_export_every_part(model_without_chunks, inputs, dynamic):
    parts = decompose_multimodal(model_without_chunks, inputs)
    assert set(parts) == {"image_encoder", "multi_modal_projector", "language_model", "lm_head"}
    for module, captured in parts.values():
        expected = get_leaf_tensors(module(**copy.deepcopy(captured)))
        given = copy.deepcopy(captured)  # the exporter changes its inputs
        program = exporters.DynamoExporter().export(module, captured, config=exporters.DynamoConfig(dynamic=dynamic))
        if isinstance(program, torch.export.ExportedProgram):  # before transformers 5.24
            program, given = program.module(), captured
        found = get_leaf_tensors(program(**given))
        assert found
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name])


# transformers' Trainer


@pytest.fixture
def questions(sliced_processor, image_of):
    """Makes a batch of pictures and texts: a collator as one writes it for any transformers model."""

    def collate(rows):
        images = [[image_of(height, 32)] for height, _ in rows]
        batch = sliced_processor(images, [f"<image>\n{text}" for _, text in rows], return_tensors="pt")
        padding = batch["attention_mask"] == 0
        image = batch["input_ids"] == sliced_processor.image_token_id
        return {**batch, "labels": batch["input_ids"].masked_fill(padding | image, -100)}

    return collate


def test_transformers_trainer_trains_it(make_tiny_model, questions, tmp_path):
    model = make_tiny_model()
    before = copy.deepcopy(model.state_dict())
    rows = [(32, "one"), (96, "two"), (64, "three"), (32, "four"), (96, "five")]
    settings = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
    )
    trainer = Trainer(model, settings, data_collator=questions, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert trainer.evaluate()["eval_loss"] < losses[0]
    for part in ("vision_tower", "multi_modal_projector", "language_model"):
        names = [name for name in before if f".{part}." in name]
        assert any(not torch.equal(before[name], model.state_dict()[name]) for name in names), part


# transformers serve


@pytest.fixture(scope="module")
def server():
    """Address of a server of the carried model, as docs/compatibility.md says to start it."""
    if not is_serve_available():
        pytest.skip("transformers[serving] is not installed")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = ["serve", str(carried_model_path()), "--device", "cpu", "--port", str(port)]
    quiet = os.environ | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([sys.executable, "-m", "tokenpacker.hf", *command], env=quiet)
    try:
        for _ in range(240):
            assert process.poll() is None
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://localhost:{port}/v1/chat/completions"
    finally:
        process.terminate()
        process.wait(timeout=30)


def post(address, url, **options):
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "what number is in the red box?"},
    ]
    body = {"model": str(carried_model_path()), "max_tokens": 8, "messages": [{"role": "user", "content": parts}]}
    request = urllib.request.Request(
        address, json.dumps(body | options).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answer.read().decode()


ADDRESSES = [
    pytest.param(str(SIGN), id="path"),
    pytest.param("data:image/png;base64," + base64.b64encode(SIGN.read_bytes()).decode(), id="data"),
]


@pytest.mark.slow
@pytest.mark.parametrize("url", ADDRESSES)
def test_transformers_serve_answers_about_a_picture(server, url):
    answer = json.loads(post(server, url))
    assert answer["choices"][0]["message"]["content"].strip() == "63"
    assert answer["usage"]["prompt_tokens"] == 385  # what the README shows for this question


@pytest.mark.slow
@pytest.mark.parametrize("url", ADDRESSES)
def test_transformers_serve_streams_its_answer(server, url):
    lines = [line.removeprefix("data: ") for line in post(server, url, stream=True).splitlines() if line]
    deltas = [json.loads(line)["choices"][0]["delta"] for line in lines if line.startswith("{")]
    assert "".join(delta.get("content") or "" for delta in deltas).strip() == "63"
    assert len([delta for delta in deltas if delta.get("content")]) > 1


# vLLM 0.32, Transformers backend: the calls in vllm/model_executor/models/transformers/multimodal.py


def test_vllm_gets_each_images_embeddings_and_their_places(tiny_model, sliced_processor, image_of):
    images = [image_of(32, 64), image_of(32, 32, 1), image_of(96, 64, 2)]
    sizes = [(image.height, image.width) for image in images]
    called = sliced_processor(
        text=sliced_processor.image_token * len(images),
        images=images,
        return_text_replacement_offsets=True,
        return_tensors="pt",
    )
    tokenizer = sliced_processor.tokenizer
    replacements = [
        torch.tensor(tokenizer.encode(entry["replacement"], add_special_tokens=False))
        for entry in called.pop("text_replacement_offsets")[0]
        if entry["type"] == "image"
    ]
    counted = sliced_processor._get_num_multimodal_tokens(image_sizes=sizes)
    assert [len(ids) for ids in replacements] == counted["num_image_tokens"]
    assert torch.equal(torch.cat(replacements), called["input_ids"][0, -sum(counted["num_image_tokens"]) :])

    fields = {name: called[name] for name in called if name not in ("input_ids", "attention_mask")}
    rows = counted["num_image_patches"]
    assert {name: len(value) for name, value in fields.items()} == dict.fromkeys(fields, sum(rows))  # split by image
    alone = [
        dict(zip(fields, parts, strict=True)) for parts in zip(*(v.split(rows) for v in fields.values()), strict=True)
    ]
    together = tiny_model.model.get_image_features(return_dict=True, **fields).pooler_output
    embeddings = together.flatten(0, 1).split([count * together.shape[1] for count in rows])
    for ids, found, own in zip(replacements, embeddings, alone, strict=True):
        assert int(ids.mode().values) == sliced_processor.image_token_id  # how vLLM tells embeddings from separators
        assert len(found) == int((ids == sliced_processor.image_token_id).sum())
        torch.testing.assert_close(found, tiny_model.model.get_image_features(**own).pooler_output.flatten(0, 1))


def test_vllm_finds_the_size_with_the_most_tokens(sliced_processor):
    def count(side):
        return sliced_processor._get_num_multimodal_tokens(image_sizes=([side, side],))["num_image_tokens"][0]

    assert count(10_000) == max(count(side) for side in range(224, 10_001, 64))


def test_vllm_takes_the_model_and_its_parts_by_transformers_own_names(tiny_model):
    assert type(tiny_model).is_backend_compatible() or type(tiny_model)._can_set_attn_implementation()
    assert tiny_model.model.get_encoder(modality="image") is tiny_model.model.vision_tower
    assert tiny_model.model.get_decoder() is tiny_model.model.language_model


def test_vllm_is_offered_what_registers_the_model():
    tomllib = pytest.importorskip("tomllib", reason="from Python 3.11 on")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for value in project["entry-points"]["vllm.general_plugins"].values():
        assert EntryPoint("plugin", value, "vllm.general_plugins").load() is register
