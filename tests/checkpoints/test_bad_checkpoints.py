"""Broken and hostile checkpoints: a clear error, and nothing half-written."""

from __future__ import annotations

import json
import os
import pickle
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch

from released_layout import TOWER
from tokenpacker.checkpoints import load_released

PROJECTOR = "model.mm_projector."


def test_unknown_missing_and_misshaped_tensors_are_all_listed_by_name(make_complete, refused):
    def spoil(tensors):
        tensors["model.mm_projector.novelty.weight"] = torch.zeros(2)
        tensors["something.else"] = torch.zeros(2)
        del tensors[f"{PROJECTOR}ln_q_1.bias"]
        tensors[f"{PROJECTOR}clip_attn.in_proj_weight"] = torch.zeros(64, 64)

    message = refused(make_complete(change=spoil))
    assert "2 unknown: model.mm_projector.novelty.weight, something.else" in message
    assert f"1 missing: {PROJECTOR}ln_q_1.bias" in message
    assert f"1 wrong shape: {PROJECTOR}clip_attn.in_proj_weight is 64x64, should be 192x64" in message


def test_a_tower_that_is_inside_in_part_is_refused(make_complete, refused):
    name = f"{TOWER}vision_model.encoder.layers.7.mlp.fc1.bias"
    assert f"1 missing: {name}" in refused(make_complete(change=lambda tensors: tensors.pop(name)))


def test_a_region_module_that_is_there_in_part_is_refused(make_complete, refused):
    def add_region_module(tensors):
        tensors["mask_extractor.feat_linear.weight"] = torch.zeros(2, 2)
        tensors["mask_extractor.res_layers.0.bias"] = torch.zeros(64)
        tensors["mask_extractor.mask_linear.bias"] = torch.zeros(64)  # of the branch's own origin, without masks here

    message = refused(make_complete(change=add_region_module))
    assert "1 unknown: mask_extractor.mask_linear.bias" in message
    assert "8 missing: mask_extractor.feat_linear.bias, mask_extractor.res_layers.0.weight" in message
    assert "1 wrong shape: mask_extractor.feat_linear.weight is 2x2, should be 32x64" in message


@pytest.mark.parametrize("weights", ["bin", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_file_that_was_cut_off(make_complete, refused, weights, share):
    src = make_complete(weights)
    file = next(path for path in src.iterdir() if path.suffix in (".bin", ".safetensors"))
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    assert refused(src).startswith(f"{file} cannot be read; it is damaged or cut off")


@pytest.mark.parametrize("weights", ["bin", "safetensors"])
def test_a_shard_that_is_not_there(make_complete, refused, weights):
    src = make_complete(weights, shards=3)
    file = next(src.glob("*-00002-of-00003.*"))
    file.unlink()
    assert f"names the shard {file.name}, which is missing" in refused(src)


def test_an_index_that_misses_an_entry(make_complete, refused):
    src = make_complete(shards=2)
    index = src / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(content))
    assert "has no entry for lm_head.weight, which the shards hold" in refused(src)
    content["weight_map"]["lm_head.weight"] = content["weight_map"]["lm_head.bias"] = "pytorch_model-00001-of-00002.bin"
    index.write_text(json.dumps(content))
    assert "places lm_head.bias in pytorch_model-00001-of-00002.bin, which does not hold it" in refused(src)


def test_shards_without_an_index(make_complete, refused):
    src = make_complete(shards=2)
    (src / "pytorch_model.bin.index.json").unlink()
    assert "has shards such as pytorch_model-00001-of-00002.bin but no index" in refused(src)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_none(make_complete, refused, content):
    src = make_complete(shards=2)
    (src / "pytorch_model.bin.index.json").write_text(content)
    assert "pytorch_model.bin.index.json is damaged" in refused(src)


def test_an_index_that_leads_out_of_the_folder(make_complete, refused):
    src = make_complete(shards=2)
    (src / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "../../elsewhere.bin"}}')
    assert "names the shard ../../elsewhere.bin, which is no weight file beside it" in refused(src)


@pytest.mark.parametrize("weights", ["bin", "safetensors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(make_complete, refused, weights, value):
    def spoil(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].clone()
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value

    assert "model.layers.1.mlp.up_proj.weight holds NaN or infinity" in refused(make_complete(weights, change=spoil))


WAS_HERE = Path(tempfile.gettempdir()) / "tokenpacker-was-here"


class Hostile:
    def __reduce__(self):
        return os.system, (f"touch {WAS_HERE}",)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(make_complete, refused, tmp_path, write):
    src = make_complete()
    write({"model.norm.weight": Hostile()}, src / "pytorch_model.bin")
    message = refused(src)
    assert message.startswith(f"{src / 'pytorch_model.bin'} is refused: beside tensors it wants to call posix.system")
    assert not WAS_HERE.exists()


@pytest.mark.parametrize(
    "content", [b"PK", b"PK\x03\x04", b"\x80\x04.", pickle.dumps(Hostile(), protocol=4), b"GIF89a"]
)
def test_a_file_of_another_kind(make_complete, refused, content):
    src = make_complete()
    (src / "pytorch_model.bin").write_bytes(content)
    assert "pytorch_model.bin cannot be read; it is damaged or cut off" in refused(src)
    assert not WAS_HERE.exists()


@pytest.mark.parametrize("value", [{"epoch": 3}, [torch.zeros(1)], {"model": {"a": torch.zeros(1)}}])
def test_a_file_with_other_things_than_tensors(make_complete, refused, value):
    src = make_complete()
    torch.save(value, src / "pytorch_model.bin")
    assert "pytorch_model.bin holds" in refused(src)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.model", "pytorch_model.bin"])
def test_a_folder_that_lacks_a_file(make_complete, refused, file):
    src = make_complete()
    (src / file).unlink()
    assert str(src) in refused(src)


@pytest.mark.parametrize("content", ["{", "[1]", '"text"', "\xff\xfe"])
def test_a_config_that_is_no_json_object(make_complete, refused, content):
    src = make_complete()
    (src / "config.json").write_text(content, encoding="latin-1")
    assert f"{src / 'config.json'} is damaged" in refused(src)


def test_sources_that_are_not_there(refused, tmp_path):
    assert refused("./nowhere").startswith("model ./nowhere does not exist; give a folder or hub id")
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(tmp_path / "file")


def test_a_base_is_asked_for_and_must_be_a_llama(make_stage_1, base_folder, make_complete, refused, tower_folder):
    src = make_stage_1()
    assert "holds only a projector; give the language model that it was trained from with --base" in refused(src)
    assert "is of the kind 'clip_vision_model'; a plain LLaMA" in refused(src, base=tower_folder)
    assert "needs no base" in refused(make_complete(), base=base_folder)


def test_a_tower_that_is_nowhere(make_complete, refused):
    src = make_complete(tower=False, config={"mm_vision_tower": "./nowhere"})
    assert refused(src).startswith(
        "model ./nowhere does not exist; give the tower's folder or hub id with --vision-tower"
    )
    src = make_complete(tower=False, config={"mm_vision_tower": None})
    assert refused(src).startswith("the checkpoint neither holds a vision tower nor names one")
    assert "the tower must be a CLIP" in refused(make_complete(), vision_tower=src)


def test_an_adapter_that_fits_no_weight(lora_folder, base_folder, refused):
    adapter = torch.load(lora_folder / "adapter_model.bin", weights_only=True)
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    torch.save(adapter | {name: torch.zeros(4, 7)}, lora_folder / "adapter_model.bin")
    assert "has shape (48, 7), the base model's weight (48, 32)" in refused(lora_folder, base=base_folder)
    torch.save({n: t for n, t in adapter.items() if n != name}, lora_folder / "adapter_model.bin")
    assert "lacks lora_A or lora_B of model.language_model.layers.0.mlp.up_proj.weight" in refused(
        lora_folder, base=base_folder
    )


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (f"{TOWER}vision_model.encoder.layers.99.mlp.fc1.bias", "unknown"),
        (f"{TOWER}vision_model.encoder.layers.23.novelty.weight", "unknown"),
        (f"{TOWER}encoder.layers.1.mlp.fc1.bias", "stored under two names"),
        (f"other.{PROJECTOR}mlp.0.bias", "unknown"),
    ],
)
def test_no_tensor_is_dropped_or_taken_in_silence(make_complete, refused, name, problem):
    src = make_complete(change=lambda tensors: tensors.update({name: torch.zeros(24)}))
    assert f"1 {problem}: {name}" in refused(src)


def test_a_stage_only_brings_what_it_trains(make_stage_1, base_folder, refused):
    src = make_stage_1(extra={"model.layers.0.mlp.up_proj.weight": torch.zeros(48, 32)})
    assert "holds what its stage does not train: model.layers.0.mlp.up_proj.weight" in refused(src, base=base_folder)


def test_a_base_with_other_heads_is_another_model(make_stage_1, base_folder, refused):
    message = refused(make_stage_1({"num_attention_heads": 8, "num_key_value_heads": 8}), base=base_folder)
    assert "has num_attention_heads=4 but" in message


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("weights", ["bin", "safetensors"])
def test_weights_are_floating_point(make_complete, refused, dtype, weights):
    src = make_complete(weights, change=lambda tensors: tensors.update({"model.norm.weight": torch.ones(32).to(dtype)}))
    assert "model.norm.weight" in refused(src)


def test_numbers_too_large_for_the_wanted_type_are_not_made_infinite(make_complete, refused):
    def enlarge(tensors):
        tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
        tensors["lm_head.weight"][0, 0] = -1e6

    assert "numbers too large for float16; use bfloat16" in refused(make_complete(change=enlarge), dtype="float16")


def test_a_compressed_archive_is_read_rightly(make_complete, tmp_path):
    src = make_complete()
    file, plain = src / "pytorch_model.bin", load_released(src)[0].state_dict()
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    packed = load_released(src)[0].state_dict()
    assert all(torch.equal(packed[name], tensor) for name, tensor in plain.items())


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "rope_theta"])
@pytest.mark.parametrize("value", [-1, 0, "many", [1], 10**12, 2.5])
def test_no_value_of_a_config_ends_in_a_traceback(make_complete, refused, key, value):
    if key == "rope_theta" and value in (10**12, 2.5):
        pytest.skip("a number that a base of frequencies can be; the stored frequencies decide")
    refused(make_complete(config={key: value}))


@pytest.mark.parametrize(
    "key", ["mm_vision_tower", "mm_use_im_start_end", "max_sequence_length", "pad_token_id", "hidden_act"]
)
@pytest.mark.parametrize("value", [[1], {"a": 1}, -5, "no such thing"])
def test_no_other_value_of_a_config_either(make_complete, refused, key, value):
    if (key, value) == ("mm_vision_tower", "no such thing"):
        pytest.skip("the name of a tower that is not here, while its weights are")
    refused(make_complete(config={key: value}))


@pytest.mark.parametrize("content", ['{"unk_token": []}', '{"bos_token": {"a": 1}}', '{"eos_token": 3}', "{", "[1]"])
def test_special_tokens_that_are_none(make_complete, refused, content):
    src = make_complete()
    (src / "special_tokens_map.json").write_text(content)
    refused(src)


@pytest.mark.parametrize("settings", [{"r": 8}, {"lora_alpha": None}, {"lora_alpha": "16"}, {"fan_in_fan_out": True}])
def test_an_adapters_settings_must_fit_its_factors(lora_folder, base_folder, refused, settings):
    file = lora_folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    assert next(iter(settings)) in refused(lora_folder, base=base_folder)
