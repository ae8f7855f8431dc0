"""Checkpoints of the region branch: loaded, converted, and written back."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from released_layout import HIDDEN, TOWER_DIM, VOCABULARY, linear, load, random_tensors
from tokenpacker.checkpoints import convert, export_original, load_released
from tokenpacker.hf import add_regions

SHAPES = {
    name: shape
    for module, rows in [*((f"res_layers.{level}", TOWER_DIM) for level in range(4)), ("feat_linear", HIDDEN)]
    for name, shape in linear(f"mask_extractor.{module}", rows, TOWER_DIM).items()
}
MASKS = [[(2, 3, 20, 30), [[5, 5, 50, 8, 30, 35]]]]


@pytest.fixture
def make_region_checkpoint(make_complete):
    """Writes a checkpoint of the region branch: its module's tensors, and `<mask>` behind the last row."""

    def make(**options):
        src = make_complete(change=lambda tensors: tensors.update(random_tensors(SHAPES, seed=9)), **options)
        (src / "added_tokens.json").write_text(json.dumps({"<mask>": VOCABULARY}))
        return src

    return make


def logits(model, processor, image):
    inputs = processor(image, "<image>\nis <mask> like <mask>?", region_masks=MASKS, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("tower", [True, False], ids=["tower-inside", "tower-outside"])
@pytest.mark.parametrize(("weights", "dtype"), [("bin", torch.float32), ("safetensors", torch.bfloat16)])
def test_a_region_checkpoint_goes_all_the_way_and_comes_back_bit_for_bit(
    make_region_checkpoint, tmp_path, image_of, weights, dtype, tower
):
    src = make_region_checkpoint(weights=weights, tower=tower, dtype=dtype)
    model, processor = load_released(src)
    for theirs, ours in (("res_layers.2", "level_projs.2"), ("feat_linear", "output_proj")):
        weight = model.model.region_encoder.get_submodule(ours).weight
        assert torch.equal(weight, random_tensors(SHAPES, seed=9)[f"mask_extractor.{theirs}.weight"].to(dtype))
    convert(src, tmp_path / "converted")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "converted")
    restored = AutoProcessor.from_pretrained(tmp_path / "converted")
    image = image_of(40, 60)
    assert torch.equal(logits(again, restored, image), logits(model, processor, image))
    export_original(tmp_path / "converted", tmp_path / "back", weights=weights)
    there, back = load(src), load(tmp_path / "back")
    assert set(there) == set(back)
    assert all(torch.equal(there[key], back[key]) and there[key].dtype == back[key].dtype for key in there)
    assert (tmp_path / "back" / "added_tokens.json").read_text() == (src / "added_tokens.json").read_text()
    assert torch.equal(logits(*load_released(tmp_path / "back"), image), logits(model, processor, image))


def add_beside_adapter(folder, tensors):
    """Adds tensors by released names to what was trained beside an adapter."""
    file = folder / "non_lora_trainables.bin"
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    torch.save(torch.load(file, weights_only=True) | named, file)
    return folder


@pytest.fixture(params=["stage-1", "lora"])
def make_partial_checkpoint(request, make_stage_1, lora_folder):
    """Adds tensors by released names to what a stage saves without its base."""

    def make(tensors):
        if request.param == "stage-1":
            return make_stage_1(extra=tensors)
        return add_beside_adapter(lora_folder, tensors)

    return make


def test_a_region_module_beside_projector_or_adapter_is_joined_with_the_base(
    make_partial_checkpoint, base_folder, tmp_path, image_of
):
    trained = random_tensors(SHAPES, seed=9)
    src = make_partial_checkpoint(trained)
    model, processor = load_released(src, base=base_folder)
    assert torch.equal(model.model.region_encoder.output_proj.bias, trained["mask_extractor.feat_linear.bias"])
    assert processor.region_rule == "centre"
    convert(src, tmp_path / "converted", base=base_folder)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "converted")
    restored = AutoProcessor.from_pretrained(tmp_path / "converted")
    image = image_of(40, 60)
    assert torch.equal(logits(again, restored, image), logits(model, processor, image))
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is <mask>?"}]}]
    assert "USER: <image>" in restored.apply_chat_template(asked, tokenize=False)  # not that of captions
    export_original(tmp_path / "converted", tmp_path / "back")
    back = load(tmp_path / "back")
    assert all(torch.equal(back[name], tensor) for name, tensor in trained.items())


def test_a_kept_adapter_leaves_the_region_module_in_the_model(lora_folder, base_folder, tmp_path, image_of):
    from peft import PeftModel

    trained = random_tensors(SHAPES, seed=9)
    add_beside_adapter(lora_folder, trained)
    merged, processor = load_released(lora_folder, base=base_folder)
    convert(lora_folder, tmp_path / "converted", base=base_folder, merge=False)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "converted")
    assert torch.equal(model.model.region_encoder.output_proj.bias, trained["mask_extractor.feat_linear.bias"])
    kept = PeftModel.from_pretrained(model, tmp_path / "converted" / "adapter")
    image = image_of(40, 60)
    # float32: the updates are summed with the weights in one, with the outputs in the other
    torch.testing.assert_close(logits(kept, processor, image), logits(merged, processor, image), atol=1e-4, rtol=1e-4)


def test_half_a_region_module_names_what_is_missing(make_partial_checkpoint, base_folder, refused):
    src = make_partial_checkpoint(random_tensors({"mask_extractor.feat_linear.bias": (HIDDEN,)}))
    assert "9 missing: mask_extractor.feat_linear.weight, mask_extractor.res_layers.0" in refused(src, base=base_folder)


def test_masks_follow_the_released_rule_and_the_mark_takes_a_free_row(make_region_checkpoint):
    model, processor = load_released(make_region_checkpoint())
    assert processor.region_rule == "centre"
    assert processor.region_token_id == model.config.region_token_id < VOCABULARY
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY
    assert processor.tokenizer.convert_ids_to_tokens(0x46 + 3) == "<0x46>"  # bytes follow three special pieces
    assert model.config.region_token_id == 0xFE + 3
    assert model.config.image_token_id == 0xFF + 3


def test_a_mark_that_has_a_row_of_its_own_keeps_it(make_complete, complete_tensors):
    def grow(tensors):
        tensors.update(random_tensors(SHAPES, seed=9))
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], tensors[name][:1]])

    src = make_complete(change=grow, config={"vocab_size": VOCABULARY + 1})
    (src / "added_tokens.json").write_text(json.dumps({"<mask>": VOCABULARY}))
    model, _ = load_released(src)
    assert model.config.region_token_id == VOCABULARY


def test_images_are_cut_whatever_the_config_says_as_in_the_region_branch(make_region_checkpoint, tmp_path):
    src = make_region_checkpoint(config={"image_aspect_ratio": None})
    notes = convert(src, tmp_path / "converted")["notes"]
    assert notes == [
        "config.json has image_aspect_ratio='square', but a model with regions was trained on images cut into tiles:"
        " image_mode is 'slice'"
    ]
    assert AutoProcessor.from_pretrained(tmp_path / "converted").image_processor.image_mode == "slice"
    export_original(tmp_path / "converted", tmp_path / "back")
    assert "image_aspect_ratio" not in json.loads((tmp_path / "back" / "config.json").read_text())


def test_a_converted_model_is_given_regions_to_be_trained(make_complete, image_of):
    model, processor = load_released(make_complete())
    text = "USER: what is this? ASSISTANT: a cat</s>USER: and 語? ASSISTANT:"
    before, logits_before = (
        processor.tokenizer(text).input_ids,
        model(**processor(text=text, return_tensors="pt")).logits,
    )
    add_regions(model, processor, rule="centre")
    assert model.config.region_token_id == 0xFE + 3
    assert processor.region_rule == "centre"
    assert processor.tokenizer(text).input_ids == before
    assert torch.equal(model(**processor(text=text, return_tensors="pt")).logits, logits_before)
    assert logits(model, processor, image_of(40, 60)).isfinite().all()


def test_a_checkpoint_without_regions_reads_mask_as_text(make_complete):
    model, processor = load_released(make_complete())
    assert model.config.region_config is None
    assert processor.region_token_id is None
    assert model.model.region_encoder is None


def test_what_the_original_would_lose_or_read_otherwise_is_refused(make_region_checkpoint, tmp_path):
    convert(make_region_checkpoint(), tmp_path / "ours")
    with pytest.raises(ValueError, match="layout='stage-1' holds the projector alone, and this model knows regions"):
        export_original(tmp_path / "ours", tmp_path / "back", layout="stage-1")
    settings = json.loads((tmp_path / "ours" / "processor_config.json").read_text())
    (tmp_path / "ours" / "processor_config.json").write_text(json.dumps(settings | {"region_rule": "coverage"}))
    with pytest.raises(ValueError, match="region_rule='coverage' is not the original's"):
        export_original(tmp_path / "ours", tmp_path / "back")
    assert not (tmp_path / "back").exists()
