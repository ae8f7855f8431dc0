"""What `export_model` writes: the layout, names and shapes that runtimes look for, and the numbers of the graphs."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import pytest
import torch

from tokenpacker.export import Manifest
from tokenpacker.hf import TokenPackerProcessor

ROUNDING = 1e-4  # two orders of float32 summation; the largest value is about 20


def opened(folder, name):
    import onnxruntime

    return onnxruntime.InferenceSession(folder / "onnx" / name, providers=["CPUExecutionProvider"])


def described(values):
    return {value.name: (value.type, value.shape) for value in values}


def test_the_files_have_the_names_that_transformers_js_looks_for(onnx_folder):
    graphs = sorted(path.name for path in (onnx_folder / "onnx").iterdir())
    assert graphs == [
        "decoder_model_merged.onnx",
        "embed_tokens.onnx",
        "vision_encoder.onnx",
        "vision_encoder_s3.onnx",
        "vision_encoder_s4.onnx",
    ]
    config = json.loads((onnx_folder / "config.json").read_text())
    assert config["image_token_index"] == config["image_token_id"]
    assert "transformers.js_config" not in config  # nothing is stored beside the graphs


def test_the_manifest_has_every_file_with_its_size_and_checksum(onnx_folder):
    manifest = Manifest.read(onnx_folder)
    there = {path.relative_to(onnx_folder).as_posix() for path in onnx_folder.rglob("*") if path.is_file()}
    assert set(manifest.files) == there - {"export.json"}
    for name, entry in manifest.files.items():
        content = (onnx_folder / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert manifest.scale_factors == [2, 3, 4]
    assert (manifest.runtime, manifest.quantization) == ("onnx", None)


def test_the_processor_is_that_of_the_model(onnx_folder, carried, image_of):
    _, processor = carried
    mine, image = TokenPackerProcessor.from_pretrained(onnx_folder), image_of(150, 220)
    for name, value in processor(image, "<image>", return_tensors="pt").items():
        assert torch.equal(mine(image, "<image>", return_tensors="pt")[name], value)


@pytest.mark.parametrize(
    ("name", "tokens"), [("vision_encoder", 36), ("vision_encoder_s3", 16), ("vision_encoder_s4", 9)]
)
def test_a_vision_encoder_takes_any_number_of_tiles(onnx_folder, carried, name, tokens):
    session, model = opened(onnx_folder, f"{name}.onnx"), carried[0]
    assert described(session.get_inputs()) == {"pixel_values": ("tensor(float)", ["num_tiles", 3, 96, 96])}
    assert described(session.get_outputs()) == {"image_features": ("tensor(float)", ["num_tiles", tokens, 128])}
    for num_tiles in (1, 2, 7):
        tiles = torch.randn(num_tiles, 3, 96, 96)
        with torch.no_grad():
            expected = model.get_image_features(tiles, scale_factor=12 // math.isqrt(tokens)).pooler_output
        (packed,) = session.run(None, {"pixel_values": tiles.numpy()})
        np.testing.assert_allclose(packed, expected, atol=ROUNDING)


def test_the_decoder_has_the_inputs_and_outputs_of_transformers_js(onnx_folder):
    session = opened(onnx_folder, "decoder_model_merged.onnx")
    new = ["batch_size", "sequence_length"]
    cache = {
        f"past_key_values.{layer}.{part}": ("tensor(float)", ["batch_size", 4, "past_sequence_length", 32])
        for layer in range(4)
        for part in ("key", "value")
    }
    assert described(session.get_inputs()) == cache | {
        "inputs_embeds": ("tensor(float)", [*new, 128]),
        "attention_mask": ("tensor(int64)", ["batch_size", "total_sequence_length"]),
        "position_ids": ("tensor(int64)", new),
    }
    longer = {
        name.replace("past_key_values", "present"): (kind, ["batch_size", 4, "total_sequence_length", 32])
        for name, (kind, _) in cache.items()
    }
    assert described(session.get_outputs()) == longer | {"logits": ("tensor(float)", ["batch_size", 1, 464])}


def decode(session, embeddings, mask, cache):
    past, total = next(iter(cache.values())).shape[2], mask.shape[1]
    positions = np.maximum(mask.cumsum(1) - 1, 0)[:, past:]
    feeds = {"inputs_embeds": embeddings, "attention_mask": mask, "position_ids": positions, **cache}
    assert total == past + embeddings.shape[1]
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(names, feeds), strict=True))
    logits = outputs.pop("logits")
    return logits, {name.replace("present", "past_key_values"): value for name, value in outputs.items()}


def test_one_graph_decodes_a_prompt_and_single_steps_of_padded_rows(onnx_folder, carried):
    session, model = opened(onnx_folder, "decoder_model_merged.onnx"), carried[0]
    embeddings = torch.randn(2, 6, 128)
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[0, :2] = 0  # padding on the left
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(inputs_embeds=embeddings, attention_mask=mask, position_ids=positions).logits
    empty = np.zeros((2, 4, 0, 32), np.float32)
    cache = {f"past_key_values.{layer}.{part}": empty for layer in range(4) for part in ("key", "value")}
    logits, cache = decode(session, embeddings[:, :4].numpy(), mask[:, :4].numpy(), cache)
    np.testing.assert_allclose(logits[:, 0], expected[:, 3], atol=ROUNDING)
    for place in (4, 5):
        step, seen = embeddings[:, place : place + 1].numpy(), mask[:, : place + 1].numpy()
        logits, cache = decode(session, step, seen, cache)
        np.testing.assert_allclose(logits[:, 0], expected[:, place], atol=ROUNDING)


def test_the_model_is_left_as_it_was(onnx_folder, carried):
    model = carried[0]
    assert type(model.model.multi_modal_projector).__name__ == "TokenPacker"
    assert model.model.language_model.config._attn_implementation == "sdpa"
    assert not any("forward" in vars(module) for module in (model.model.vision_tower, model.model.language_model))
