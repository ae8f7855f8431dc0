"""Regions through processor and model: where masks go, what they are checked for, and that answers depend on them."""

import copy
import json

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor, add_regions
from tokenpacker.hf.outputs import ImageFeatures
from tokenpacker.hf.regions.region_setup import add_region_token
from tokenpacker.hf.versions import CACHE


def half(height, width, side):
    """A mask of the left or right half of an image."""
    mask = np.zeros((height, width), dtype=bool)
    columns = slice(0, width // 2) if side == "left" else slice(width // 2, None)
    mask[:, columns] = True
    return mask


@pytest.fixture(scope="module")
def batch(image_of):
    """Samples with two regions, no image, an image without regions, and two images: images, text, regions."""
    return [
        ([image_of(64, 96)], "<image>\nis <mask> like <mask>?", [half(64, 96, "left"), (10, 10, 40, 50)]),
        ([], "hello", []),
        ([image_of(40, 30, 1)], "<image>\nwhat?", []),
        ([image_of(32, 32, 2), image_of(90, 40, 3)], "<image> <image>\n<mask>?", [[], [[5, 5, 30, 5, 30, 60]]]),
    ]


def inputs_of(processor, samples, **options):
    regions = []
    for images, _, masks in samples:
        regions += [masks] if len(images) == 1 else masks
    images, texts = [sample[0] for sample in samples], [sample[1] for sample in samples]
    return processor(images, texts, region_masks=regions, return_tensors="pt", **options)


def test_a_batch_holds_the_regions_of_all_samples_in_order(region_model, batch):
    _, processor = region_model
    inputs = inputs_of(processor, batch)
    tiles = [processor.image_layout((p.height, p.width)).tile_grid.num_tiles for images, *_ in batch for p in images]
    assert inputs["region_first_tile"].tolist() == [0, 0, sum(tiles[:3])]
    assert inputs["region_cells"].shape == (3, max(tiles[0], tiles[3]), 64)
    alone = inputs_of(processor, batch[:1])["region_cells"]
    assert torch.equal(inputs["region_cells"][:2, : alone.shape[1]], alone)
    assert "region_cells" not in inputs_of(processor, batch[1:3])


def test_region_tokens_stand_where_their_markers_are(region_model, batch):
    model, processor = region_model
    inputs = inputs_of(processor, batch)
    output = model(**inputs)
    regions = model.get_image_features(
        **{name: inputs[name] for name in ("pixel_values", "region_cells", "region_first_tile")}
    ).region_tokens
    assert regions.shape == (3, 32)
    assert torch.equal(output.region_hidden_states, regions)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    embeddings[inputs["input_ids"] == processor.image_token_id] = output.packed_tokens.flatten(0, 1)
    embeddings[inputs["input_ids"] == processor.region_token_id] = regions
    expected = model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).logits
    torch.testing.assert_close(output.logits, expected)


def test_only_the_sample_whose_mask_changes_answers_otherwise(region_model, batch):
    model, processor = region_model
    images, text, _ = batch[0]
    changed = [(images, text, [half(64, 96, "right"), (10, 10, 40, 50)]), *batch[1:]]
    one, other = (model(**inputs_of(processor, samples)).logits for samples in (batch, changed))
    assert not torch.allclose(one[0], other[0], atol=1e-3)
    assert torch.equal(one[1:], other[1:])


def answers(model, processor, samples, **options):
    inputs = inputs_of(processor, samples)
    output = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, **options)
    return output[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize(
    "options",
    [{"do_sample": False}, {"num_beams": 3, "do_sample": False}, {"do_sample": False, "use_cache": False}],
    ids=["greedy", "beams", "without cache"],
)
def test_a_mixed_batch_answers_as_each_sample_alone(region_model, batch, options):
    model, processor = region_model
    together = answers(model, processor, batch, **options)
    for answer, sample in zip(together, batch, strict=True):
        assert torch.equal(answer, answers(model, processor, [sample], **options)[0])


def test_several_answers_per_sample_keep_their_regions(region_model, batch):
    model, processor = region_model
    greedy = answers(model, processor, batch, do_sample=False)
    several = answers(model, processor, batch, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(several, greedy.repeat_interleave(2, dim=0))


def test_packed_and_region_tokens_can_be_given_instead_of_pixels(region_model, batch):
    model, processor = region_model
    inputs = inputs_of(processor, batch)
    expected = model(**inputs).logits
    names = ("pixel_values", "region_cells", "region_first_tile")
    images = model.get_image_features(**{name: inputs.pop(name) for name in names})
    given = model(**inputs, mm_encoder_outputs={"image": images})
    assert torch.equal(given.logits, expected)


def test_a_cached_image_can_be_asked_about_with_region_tokens_alone(region_model, image_of):
    model, processor = region_model
    inputs = processor(image_of(64, 96), "<image>\nwhat is <mask>?", region_masks=[[(0, 0, 9, 9)]], return_tensors="pt")
    expected = model(**inputs).logits
    ids, regions = inputs["input_ids"], {name: inputs[name] for name in ("region_cells", "region_first_tile")}
    tokens = model.get_image_features(inputs["pixel_values"], **regions).region_tokens
    prefix = int((ids == processor.image_token_id).nonzero()[-1, 1]) + 1
    cache = model(input_ids=ids[:, :prefix], pixel_values=inputs["pixel_values"], use_cache=True)[CACHE]
    later = {"mm_encoder_outputs": {"image": ImageFeatures(region_tokens=tokens)}, CACHE: cache}
    rest = model(input_ids=ids[:, prefix:], **later).logits
    # float32 attention over a cache sums in another order
    torch.testing.assert_close(rest, expected[:, prefix:], atol=1e-5, rtol=1e-5)


def test_tiles_that_are_kept_once_give_the_same_answer(region_model, image_of):
    model, processor = region_model
    samples = [
        ([image_of(32, 32)], f"<image>{text}<mask>", [box])
        for text, box in (("a", (0, 0, 9, 9)), ("b", (9, 9, 30, 20)))
    ]
    inputs = inputs_of(processor, samples)
    once = {**inputs, "pixel_values": inputs["pixel_values"][:1], "tile_index": torch.tensor([0, 0])}
    torch.testing.assert_close(model(**once).logits, model(**inputs).logits)


def test_the_loss_reaches_the_region_encoder_and_no_regions_give_a_zero_gradient(
    make_tiny_model, tiny_tokenizer, batch
):
    model = make_tiny_model()
    processor = TokenPackerProcessor.from_config(model.config, tiny_tokenizer)
    add_regions(model, processor)
    inputs = inputs_of(processor, batch)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.model.region_encoder.parameters())
    model.zero_grad()
    none = inputs_of(processor, batch[1:3])
    cells = {"region_cells": torch.zeros(0, 1, 64), "region_first_tile": torch.zeros(0, dtype=torch.int64)}
    model(**none, **cells, labels=none["input_ids"]).loss.backward()
    assert all((parameter.grad == 0).all() for parameter in model.model.region_encoder.parameters())


def test_a_model_is_made_from_parts_with_regions(region_model, batch):
    model, processor = region_model
    config = model.config
    made = TokenPackerForConditionalGeneration.from_parts(
        AutoModel.from_config(config.vision_config),
        AutoModelForCausalLM.from_config(config.text_config),
        vision_levels=config.vision_levels,
        image_token_id=config.image_token_id,
        projector_config=config.projector_config,
        region_config={},
        region_token_id=processor.region_token_id,
    )
    assert not any(parameter.is_meta for parameter in made.parameters())
    assert made(**inputs_of(processor, batch)).region_hidden_states.shape == (3, 32)


def test_a_model_with_regions_survives_saving(region_model, batch, tmp_path):
    model, processor = region_model
    model.save_pretrained(tmp_path)
    released = copy.copy(processor)
    released.region_rule = "centre"
    released.save_pretrained(tmp_path)
    again, restored = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert restored.region_rule == "centre"
    assert restored.region_token_id == processor.region_token_id == again.config.region_token_id
    inputs = inputs_of(processor, batch)
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)
    assert torch.equal(inputs_of(restored, batch)["input_ids"], inputs["input_ids"])


def test_the_pipeline_takes_regions(region_model, region_model_dir, image_of):
    model, processor = region_model
    ask = pipeline("image-text-to-text", model=str(region_model_dir))
    picture, text = image_of(40, 40), "what is <mask>?"
    content = [{"type": "image", "image": picture}, {"type": "text", "text": text}]
    said = ask(
        text=[{"role": "user", "content": content}],
        processor_kwargs={"region_masks": [[(0, 0, 20, 20)]]},
        generate_kwargs={"max_new_tokens": 4, "do_sample": False},
    )
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(picture, prompt, region_masks=[[(0, 0, 20, 20)]], return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert said[0]["generated_text"][-1]["content"] == processor.decode(tokens, skip_special_tokens=True)


def test_a_model_without_regions_reads_mask_as_text_and_refuses_regions(tiny_model, tiny_processor, image_of):
    assert tiny_processor.region_token_id is None
    assert tiny_model.model.region_encoder is None
    plain = tiny_processor(image_of(32, 32), "<image>what is <mask>?", return_tensors="pt")
    tiny_model(**plain)
    assert "<mask>" in tiny_processor.decode(plain["input_ids"][0])
    with pytest.raises(ValueError, match="the tokenizer has no token '<mask>'; use a model that has learned regions"):
        tiny_processor(image_of(32, 32), "<image>what is <mask>?", region_masks=[[(0, 0, 9, 9)]])
    with pytest.raises(ValueError, match=r"the model does not know regions; .* with tokenpacker\.hf\.add_regions"):
        tiny_model(**plain, region_cells=torch.ones(1, 1, 64), region_first_tile=torch.tensor([0]))
    with pytest.raises(ValueError, match="the model does not know regions"):
        tiny_model(
            input_ids=plain["input_ids"], mm_encoder_outputs={"image": ImageFeatures(region_tokens=torch.ones(1, 32))}
        )


BOX = (0, 0, 9, 9)


def test_inputs_that_exclude_each_other_are_refused(region_model, batch):
    model, processor = region_model
    inputs = inputs_of(processor, batch)
    without = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with pytest.raises(ValueError, match="hold 3 region tokens but there are 0 regions"):
        model(**without)
    with pytest.raises(ValueError, match="region_cells need region_first_tile"):
        model(**without, region_cells=inputs["region_cells"])
    with pytest.raises(ValueError, match="region_cells was given without pixel_values"):
        model(input_ids=inputs["input_ids"], region_cells=inputs["region_cells"])
    encoded = {"image": ImageFeatures(region_tokens=torch.zeros(3, 32))}
    with pytest.raises(ValueError, match="pass pixel_values or mm_encoder_outputs, not both"):
        model(**without, mm_encoder_outputs=encoded)


def test_the_mask_token_takes_a_byte_that_no_text_contains(tiny_tokenizer, tmp_path):
    changed = add_region_token(tiny_tokenizer)
    assert len(changed) == len(tiny_tokenizer)
    assert "<mask>" not in tiny_tokenizer.get_vocab()
    assert add_region_token(changed) is changed
    text = "þ and every byte: é 語 \U0001f600"
    assert changed(text).input_ids == tiny_tokenizer(text).input_ids
    ids = changed("is <mask> red?").input_ids
    assert ids.count(changed.convert_tokens_to_ids("<mask>")) == 1
    assert changed.decode(ids, skip_special_tokens=True) == "is  red?"
    changed.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("is <mask> red?").input_ids == ids


def test_where_no_byte_is_free_the_embedding_gets_a_row(make_tiny_model, tiny_tokenizer, image_of):
    from tokenizers import Tokenizer

    content = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    content["model"]["vocab"]["another"] = content["model"]["vocab"].pop("þ")
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))
    model = make_tiny_model()
    processor = TokenPackerProcessor.from_config(model.config, tokenizer)
    before = model.get_input_embeddings().weight.clone()
    add_regions(model, processor)
    assert processor.region_token_id == len(tiny_tokenizer)
    assert torch.equal(model.get_input_embeddings().weight[:-1], before)
    inputs = processor(image_of(32, 32), "<image><mask>", region_masks=[[BOX]], return_tensors="pt")
    assert model(**inputs).logits.shape[-1] == len(tiny_tokenizer) + 1
    assert isinstance(model, TokenPackerForConditionalGeneration)
    with pytest.raises(ValueError, match="the model knows regions already"):
        add_regions(model, processor)
