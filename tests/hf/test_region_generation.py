"""`generate` with regions, in all its ways, and what the model refuses of regions."""

import numpy as np
import pytest
import torch

from tokenpacker.hf.outputs import ImageFeatures

REGION_INPUTS = ("region_cells", "region_first_tile")


@pytest.fixture(scope="module")
def inputs(region_model, image_of):
    """A batch: two regions, text alone, an image without regions, two images of which the second has a region."""
    _, processor = region_model
    left = np.zeros((64, 96), dtype=bool)
    left[:, :48] = True
    images = [[image_of(64, 96)], [], [image_of(40, 30, 1)], [image_of(32, 32, 2), image_of(90, 40, 3)]]
    texts = ["<image>\nis <mask> like <mask>?", "hello", "<image>\nwhat?", "<image> <image>\n<mask>?"]
    regions = [[left, (10, 10, 40, 50)], [], [], [(5, 5, 30, 60)]]
    return processor(images, texts, region_masks=regions, return_tensors="pt")


@pytest.fixture(scope="module")
def question(region_model, image_of):
    """One image and one region of it."""
    _, processor = region_model
    text = "USER: <image>\nwhat is <mask>? ASSISTANT:"
    return processor(image_of(64, 96), text, region_masks=[[(0, 0, 40, 30)]], return_tensors="pt")


def answers(model, inputs, **options):
    options = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5} | options
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


def test_a_static_cache_gives_the_same_answers(region_model, inputs):
    model, _ = region_model
    static = answers(model, inputs, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, answers(model, inputs))


def test_beams_weigh_the_regions_of_their_own_sample_and_encode_them_once(region_model, inputs):
    model, _ = region_model
    calls, scores = [], []
    hook = model.model.region_encoder.register_forward_hook(lambda *_: calls.append(1))
    for cells in (inputs["region_cells"], inputs["region_cells"].flip(2)):
        asked = {**inputs, "region_cells": cells, "num_beams": 3, "num_return_sequences": 2}
        found = model.generate(**asked, max_new_tokens=4, output_scores=True, return_dict_in_generate=True)
        scores.append(found.sequences_scores.view(4, 2))
    hook.remove()
    assert len(calls) == 2
    assert (scores[0] != scores[1]).all(dim=1).tolist() == [True, False, False, True]
    assert torch.equal(scores[0][1:3], scores[1][1:3])  # text alone, and an image without regions


@pytest.mark.parametrize("scale_factor", [1, 4])
def test_a_scale_factor_of_one_call_leaves_the_regions_as_they_are(region_model, image_of, scale_factor):
    model, processor = region_model
    prompt = {"images": image_of(64, 96), "text": "<image><mask>?", "region_masks": [[(0, 0, 40, 30)]]}
    inputs = processor(**prompt, scale_factor=scale_factor, return_tensors="pt")
    usual = processor(**prompt, return_tensors="pt")
    output = model(**inputs, scale_factor=scale_factor)
    assert output.packed_tokens.shape[1] == 64 / scale_factor**2
    assert torch.equal(output.region_hidden_states, model(**usual).region_hidden_states)
    found = answers(model, inputs, scale_factor=scale_factor, min_new_tokens=None, max_new_tokens=3)
    assert found[0, 0] == output.logits[0, -1].argmax()
    alike = {"do_sample": True, "top_k": 1, "num_return_sequences": 2, "min_new_tokens": None, "max_new_tokens": 3}
    assert torch.equal(answers(model, inputs, scale_factor=scale_factor, **alike), found.expand(2, -1))


@pytest.mark.parametrize("end", ["ASSISTANT:", "of"], ids=["as before the image", "as before the region"])
def test_prompt_lookup_gives_the_same_answer(region_model, image_of, end):
    """The last words of the prompt stand in it before, where a placeholder follows: no guess for an answer."""
    model, processor = region_model
    text = f"USER: <image>\nwhat of <mask>, and {end}"
    inputs = processor(image_of(64, 96), text, region_masks=[[(0, 0, 40, 30)]], return_tensors="pt")
    found = answers(model, inputs, prompt_lookup_num_tokens=4)
    placeholders = [processor.image_token_id, processor.region_token_id]  # which random weights may well answer
    assert torch.equal(found, answers(model, inputs, suppress_tokens=placeholders))
    first = [int(found[0, 0])]
    found = answers(model, inputs, prompt_lookup_num_tokens=4, suppress_tokens=first)
    assert torch.equal(found, answers(model, inputs, suppress_tokens=[*placeholders, *first]))


@pytest.mark.parametrize("beams", [1, 2])
def test_counts_that_differ_are_named(region_model, inputs, beams):
    model, _ = region_model
    fewer = {**inputs, **{name: inputs[name][:2] for name in REGION_INPUTS}}
    with pytest.raises(ValueError, match=r"the prompts hold 3 region tokens but .*2 "):
        answers(model, fewer, num_beams=beams)
    places = int((inputs["input_ids"] == model.config.image_token_id).sum())
    with pytest.raises(ValueError, match=f"the prompts hold {places} image tokens but .*{places * 4} .*scale_factors"):
        answers(model, {**inputs, "scale_factors": inputs["scale_factors"] // 2}, num_beams=beams)


def test_a_model_without_regions_refuses_region_tokens_for_beams(tiny_model, tiny_processor):
    text = tiny_processor(text="what is <mask>?", return_tensors="pt")
    with pytest.raises(ValueError, match="the model does not know regions"):
        answers(tiny_model, {**text, **encoded(region_tokens=torch.zeros(1, 32))}, num_beams=2)


def encoded(**fields):
    return {"mm_encoder_outputs": {"image": ImageFeatures(**fields)}}


def test_encoded_images_and_regions_do_not_stand_beside_tiles(region_model, question):
    model, _ = region_model
    for fields in ({"region_tokens": torch.zeros(1, 32)}, {"pooler_output": torch.zeros(7, 16, 32)}):
        with pytest.raises(ValueError, match="pass pixel_values or mm_encoder_outputs, not both"):
            model(**question, **encoded(**fields))


@pytest.mark.parametrize("name", ["region_cells", "region_first_tile", "tile_index"])
def test_what_speaks_of_tiles_needs_tiles(region_model, question, name):
    model, _ = region_model
    given = {"tile_index": torch.arange(7), **question}[name]
    with pytest.raises(ValueError, match=f"{name} was given without pixel_values"):
        model(input_ids=question["input_ids"], **{name: given})


def test_regions_without_the_tiles_of_their_images_are_refused(region_model, question):
    model, _ = region_model
    regions, none = {name: question[name] for name in REGION_INPUTS}, question["pixel_values"][:0]
    with pytest.raises(ValueError, match="region_cells hold 1 regions but pixel_values hold no tiles"):
        model.get_image_features(none, **regions)
    for name in REGION_INPUTS:
        with pytest.raises(ValueError, match="region_cells need region_first_tile"):
            model.get_image_features(question["pixel_values"], **{name: regions[name]})


def test_no_regions_and_no_tiles_give_no_tokens(region_model):
    model, _ = region_model
    cells = {"region_cells": torch.zeros(0, 1, 64), "region_first_tile": torch.zeros(0, dtype=torch.int64)}
    features = model.get_image_features(torch.zeros(0, 3, 32, 32), **cells)
    assert (features.pooler_output.shape, features.region_tokens.shape) == ((0, 16, 32), (0, 32))
    assert model.get_image_features(torch.zeros(1, 3, 32, 32), **cells).region_tokens.shape == (0, 32)


@pytest.mark.parametrize("beams", [1, 2])
def test_inputs_that_contradict_each_other_are_refused_with_and_without_beams(region_model, question, beams):
    model, _ = region_model
    with pytest.raises(ValueError, match="pass pixel_values or mm_encoder_outputs, not both"):
        answers(model, {**question, **encoded(pooler_output=torch.zeros(7, 16, 32))}, num_beams=beams)
    without = {name: value for name, value in question.items() if name != "pixel_values"}
    with pytest.raises(ValueError, match="region_cells was given without pixel_values"):
        answers(model, without, num_beams=beams)
