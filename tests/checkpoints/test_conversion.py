"""Checkpoints of every kind, through convert, load_released, save_pretrained, from_pretrained, generate, and back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from released_layout import TOWER, VOCABULARY, load, save
from tokenpacker.checkpoints import convert, export_original, load_released


def answer(model, processor, image):
    """Logits of a prompt and the tokens that follow it."""
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    inputs = processor(images=[image], text=prompt, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    return logits, model.generate(**inputs, max_new_tokens=4, do_sample=False)


def assert_same_answer(one, other, image):
    (logits, tokens), (other_logits, other_tokens) = answer(*one, image), answer(*other, image)
    torch.testing.assert_close(logits, other_logits, atol=1e-5, rtol=0)  # another order of float32 sums at most
    assert tokens.tolist() == other_tokens.tolist()


def from_pretrained(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize("tower", [True, False], ids=["tower-inside", "tower-outside"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("weights", ["bin", "safetensors"])
def test_a_complete_checkpoint_goes_all_the_way_and_comes_back_bit_for_bit(
    make_complete, tmp_path, image_of, weights, shards, tower
):
    src = make_complete(weights, shards, tower)
    loaded = load_released(src)
    convert(src, tmp_path / "converted", shard_bytes=100_000)
    assert_same_answer(loaded, from_pretrained(tmp_path / "converted"), image_of(40, 60))
    loaded[0].save_pretrained(tmp_path / "saved")
    loaded[1].save_pretrained(tmp_path / "saved")
    assert_same_answer(loaded, from_pretrained(tmp_path / "saved"), image_of(40, 60))
    for name in ("converted", "saved"):
        export_original(tmp_path / name, tmp_path / f"{name}-back", weights=weights, shard_bytes=150_000)
        there, back = load(src), load(tmp_path / f"{name}-back")
        assert set(there) == set(back)
        assert all(torch.equal(there[key], back[key]) and there[key].dtype == back[key].dtype for key in there)
        assert_same_answer(loaded, load_released(tmp_path / f"{name}-back"), image_of(40, 60))


def test_a_stage_1_folder_becomes_a_model_with_its_base(
    make_stage_1, base_folder, complete_tensors, tmp_path, image_of
):
    src = make_stage_1()
    model, processor = load_released(src, base=base_folder)
    convert(src, tmp_path / "converted", base=base_folder)
    logits, _ = answer(model, processor, image_of(30, 30))
    assert torch.equal(logits, answer(*from_pretrained(tmp_path / "converted"), image_of(30, 30))[0])
    assert processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "a boat"}], tokenize=False
    ).endswith("<image>\na boat\n")
    export_original(tmp_path / "converted", tmp_path / "stage-1-back", layout="stage-1")
    back = torch.load(tmp_path / "stage-1-back" / "mm_projector.bin", weights_only=True)
    there = torch.load(src / "mm_projector.bin", weights_only=True)
    assert set(there) == set(back)
    assert all(torch.equal(there[name], back[name]) for name in there)


def test_a_model_saved_under_old_names_is_written_back_the_same(make_complete, tmp_path):
    src = make_complete(dtype=torch.bfloat16)
    convert(src, tmp_path / "converted", dtype="float32")
    for path in (tmp_path / "converted").glob("*.safetensors"):
        weights = load_file(path)
        old = {name.replace(".multi_modal_projector.", ".projector."): tensor for name, tensor in weights.items()}
        assert set(old) != set(weights)
        save_file(old, path, metadata={"format": "pt"})
    config = tmp_path / "converted" / "config.json"
    config.write_text(config.read_text().replace("model.multi_modal_projector.", "model.projector."))
    export_original(tmp_path / "converted", tmp_path / "back")
    there, back = load(src), load(tmp_path / "back")
    assert set(there) == set(back)
    assert all(there[name].dtype == back[name].dtype and torch.equal(there[name], back[name]) for name in there)
    export_original(tmp_path / "converted", tmp_path / "stage-1", layout="stage-1")
    projector = torch.load(tmp_path / "stage-1" / "mm_projector.bin", weights_only=True)
    assert projector
    assert all(torch.equal(projector[name], there[name]) for name in projector)


def test_new_tokens_of_stage_1_take_their_rows_from_its_file(make_stage_1, base_folder, complete_tensors):
    rows = complete_tensors["model.embed_tokens.weight"].shape[0]
    trained = torch.randn(rows + 2, complete_tensors["model.embed_tokens.weight"].shape[1])
    config = {"mm_use_im_start_end": True, "vocab_size": rows + 2}
    model, processor = load_released(make_stage_1(config, {"model.embed_tokens.weight": trained}), base=base_folder)
    assert torch.equal(model.get_input_embeddings().weight, trained)
    head, base_head = model.lm_head.weight, complete_tensors["lm_head.weight"]
    assert torch.equal(head[:rows], base_head)
    torch.testing.assert_close(head[rows:], base_head.mean(0, keepdim=True).expand(2, -1))
    assert processor.tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"]) == [rows, rows + 1]
    text = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=False)
    assert "<im_start><image><im_end>" in text


def test_a_lora_checkpoint_is_merged(lora_folder, base_folder, complete_tensors, tmp_path, image_of):
    model, processor = load_released(lora_folder, base=base_folder)
    adapter = torch.load(lora_folder / "adapter_model.bin", weights_only=True)
    name = "model.layers.1.mlp.up_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    expected = complete_tensors[f"{name}.weight"] + 16 / 4 * b @ a  # alpha / r
    merged = model.model.language_model.layers[1].mlp.up_proj.weight
    torch.testing.assert_close(merged, expected)
    convert(lora_folder, tmp_path / "converted", base=base_folder)
    assert_same_answer((model, processor), from_pretrained(tmp_path / "converted"), image_of(30, 40))


def test_a_kept_adapter_answers_as_the_merged_one(lora_folder, base_folder, tmp_path, image_of):
    from peft import PeftModel

    merged = load_released(lora_folder, base=base_folder)
    kept, processor = load_released(lora_folder, base=base_folder, merge=False)
    assert isinstance(kept, PeftModel)
    logits = answer(*merged, image_of(30, 40))[0]
    torch.testing.assert_close(answer(kept, processor, image_of(30, 40))[0], logits, atol=1e-4, rtol=1e-4)
    convert(lora_folder, tmp_path / "converted", base=base_folder, merge=False)
    model, processor = from_pretrained(tmp_path / "converted")
    assert not torch.allclose(answer(model, processor, image_of(30, 40))[0], logits, atol=1e-2)  # the base alone
    again = PeftModel.from_pretrained(model, tmp_path / "converted" / "adapter")
    torch.testing.assert_close(answer(again, processor, image_of(30, 40))[0], logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="keeps a LoRA adapter"):
        export_original(tmp_path / "converted", tmp_path / "back")


def test_an_adapter_leaves_the_vision_tower_alone(lora_folder, base_folder):
    kept, _ = load_released(lora_folder, base=base_folder, merge=False)
    adapted = {name for name, _ in kept.named_modules() if name.endswith("lora_A")}
    assert adapted
    assert all(".language_model.layers." in name for name in adapted)


def test_another_vision_tower_can_be_given(make_complete, tower_folder, tower_tensors):
    def shift(tensors):
        tensors[f"{TOWER}vision_model.embeddings.class_embedding"] = stored + 1

    stored = tower_tensors["vision_model.embeddings.class_embedding"]
    src = make_complete(change=shift)
    inside, _ = load_released(src)
    given, _ = load_released(src, vision_tower=tower_folder)
    assert torch.equal(inside.model.vision_tower.embeddings.class_embedding, stored + 1)
    assert torch.equal(given.model.vision_tower.embeddings.class_embedding, stored)


def test_a_tower_whose_folder_is_gone_is_told_from_its_tensors(make_complete, tmp_path, image_of):
    here = load_released(make_complete())
    src = make_complete(config={"mm_vision_tower": "/nowhere/clip"})
    assert_same_answer(here, load_released(src), image_of(20, 30))
    notes = convert(src, tmp_path / "converted")["notes"]
    assert len(notes) == 1
    assert "/nowhere/clip is not on this machine" in notes[0]


def test_dtype_casts_on_the_way(make_complete, tmp_path):
    src = make_complete()
    model, _ = load_released(src, dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    convert(src, tmp_path / "half", dtype="float16")
    half = AutoModelForImageTextToText.from_pretrained(tmp_path / "half", dtype="auto")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}
    with pytest.raises(ValueError, match="dtype='int4' is unknown; use one of"):
        convert(src, tmp_path / "quarter", dtype="int4")


def test_each_tensor_gets_the_type_back_that_it_came_in(make_complete, tmp_path):
    def as_original_training_writes(tensors):  # trained parts in float32, the frozen tower in bfloat16
        tensors.update({name: t.bfloat16() for name, t in tensors.items() if name.startswith(TOWER)})

    src = make_complete(change=as_original_training_writes)
    model, processor = load_released(src)
    assert model.model.vision_tower.dtype == torch.float32
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    export_original(tmp_path / "saved", tmp_path / "back")
    there, back = load(src), load(tmp_path / "back")
    assert all(there[key].dtype == back[key].dtype and torch.equal(there[key], back[key]) for key in there)


def test_a_weight_that_was_trained_on_keeps_its_precision_on_the_way_back(make_complete, tmp_path):
    model, processor = load_released(make_complete(dtype=torch.bfloat16), dtype="float32")
    with torch.no_grad():
        model.lm_head.weight.add_(1e-4)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    export_original(tmp_path / "saved", tmp_path / "back")
    back = load(tmp_path / "back")
    assert torch.equal(back["lm_head.weight"], model.lm_head.weight)
    assert back["model.norm.weight"].dtype == torch.bfloat16


def test_the_spare_layer_is_kept_but_neither_runs_nor_trains(make_complete):
    model, _ = load_released(make_complete())
    assert len(model.model.spare_vision_layers) == 1  # 24 layers, of which 23 run
    assert not any(parameter.requires_grad for parameter in model.model.spare_vision_layers.parameters())
    outside, _ = load_released(make_complete(tower=False))
    assert not hasattr(outside.model, "spare_vision_layers")


def test_a_model_of_another_architecture_cannot_be_written_back(tiny_model_dir, tmp_path):
    with pytest.raises(
        ValueError, match="the original layout has no place for this model: projector heads is 4, must be 8"
    ):
        export_original(tiny_model_dir, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_settings_beyond_the_papers_cannot_be_written_back(tiny_model_dir, tmp_path):
    config = json.loads((tiny_model_dir / "config.json").read_text())
    config["multi_modal_projector_config"] |= {"queries_per_side": 2}
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="projector beyond the paper is queries_per_side=2, must be None"):
        export_original(tmp_path / "model", tmp_path / "back")


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["bin", "safetensors"])
def test_the_golden_checkpoints_go_all_the_way_and_come_back(make_golden, tmp_path, image_of, weights):
    """Of released width: 24 layers of 1024, written by the script that comes with the golden data."""
    made = make_golden("--weights", weights, "--dtype", "float16")
    src = made / "llava-tokenpacker"
    there = load(src)
    loaded = load_released(src, dtype="float32")
    convert(src, tmp_path / "converted")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "converted", dtype=torch.float32).eval()
    assert_same_answer(loaded, (model, AutoProcessor.from_pretrained(tmp_path / "converted")), image_of(336, 336))
    loaded[0].save_pretrained(tmp_path / "saved")
    loaded[1].save_pretrained(tmp_path / "saved")
    for name in ("converted", "saved"):
        export_original(tmp_path / name, tmp_path / f"{name}-back", weights=weights)
        back = load(tmp_path / f"{name}-back")
        assert set(there) == set(back)
        assert all(torch.equal(there[key], back[key]) and there[key].dtype == back[key].dtype for key in there)
    # The tower beside the model, in shards; and the projector of stage 1 with its base.
    for path in [*src.glob("pytorch_model*"), *src.glob("model*.safetensors")]:
        path.unlink()
    save({key: value for key, value in there.items() if not key.startswith(TOWER)}, src, weights, shards=3)
    outside, processor = load_released(src, dtype="float32")
    assert_same_answer(loaded, (outside, processor), image_of(336, 336))
    stage_1, _ = load_released(made / "llava-tokenpacker-pretrain", base=made / "vicuna-tiny", dtype="float32")
    expected = loaded[0].state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in stage_1.state_dict().items())


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("weights", ["bin", "safetensors"])
def test_memory_holds_one_file_beside_the_model(make_complete, tmp_path, weights, dtype):
    """Peak memory of loading and of converting four shards of 23 MB, in a process of its own."""
    src = make_complete(weights, config={"intermediate_size": 120_000}, change=enlarge, shards=4)
    code = (
        "import resource\n"
        "from tokenpacker.checkpoints import convert, load_released\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        f"load_released({str(make_complete(weights))!r})\n"  # what the libraries need
        "before = peak()\n"
        f"convert({str(src)!r}, {str(tmp_path / 'converted')!r}, dtype={dtype!r}, shard_bytes=20_000_000)\n"
        "print(peak() - before)\n"
        f"load_released({str(src)!r}, dtype={dtype!r})\n"
        "print(peak() - before)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    converting, loading = map(float, result.stdout.split())
    files = [path.stat().st_size / 2**20 for path in src.iterdir() if path.suffix in (".bin", ".safetensors")]
    allowed = max(files) + 120_000 * 32 * 4 / 2**20  # a shard and the largest tensor
    assert converting < allowed + 20_000_000 / 2**20  # and the shard that is being written
    assert loading < sum(files) / (2 if dtype else 1) + allowed


def enlarge(tensors):
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if ".mlp.up_proj" in name or ".mlp.gate_proj" in name]:
        tensors[name] = torch.randn(120_000, 32, generator=generator)
    for name in [name for name in tensors if ".mlp.down_proj" in name]:
        tensors[name] = torch.randn(32, 120_000, generator=generator)


def test_position_ids_of_older_files_come_back(make_complete, tmp_path):
    name, ids = f"{TOWER}vision_model.embeddings.position_ids", torch.arange(17)[None]
    src = make_complete(change=lambda tensors: tensors.update({name: ids}))
    convert(src, tmp_path / "converted")
    export_original(tmp_path / "converted", tmp_path / "back")
    assert torch.equal(load(tmp_path / "back")[name], ids)


def test_merging_is_what_peft_does(lora_folder, base_folder):
    merged, _ = load_released(lora_folder, base=base_folder)
    kept, _ = load_released(lora_folder, base=base_folder, merge=False)
    expected = kept.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)


def test_the_processor_encodes_as_training_did_with_start_and_end_marks(make_complete):
    from tokenpacker.data.labels import prepare_example
    from tokenpacker.hf.processing.prompts import ImageTokens, encode_prompts

    def widen(tensors):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], tensors[name][:2]])

    src = make_complete(change=widen, config={"mm_use_im_start_end": True, "vocab_size": VOCABULARY + 2})
    _, processor = load_released(src)
    for question in ("What is it?", "The door", "two boats", " a"):
        conversation = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": "a boat"}]
        trained = prepare_example(conversation, processor.tokenizer, has_image=True, image_start_end=True)
        prompt = processor.apply_chat_template(
            [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.strip()}]},
                {"role": "assistant", "content": "a boat"},
            ],
            tokenize=False,
        )
        mark = processor.image_token_id
        given = encode_prompts(processor.tokenizer, [prompt], [[ImageTokens([mark], ["<image>"])]], mark, {})
        given = given["input_ids"][0]
        assert given == list(trained.input_ids)
