"""A scale factor is said once, to the processor; it may be another one for each tile."""

import copy
import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenpacker.hf import TokenPackerProcessor

SIZE = (64, 96)  # 2x3 tiles and a thumbnail
MIXED = [1, 2, 3, 4, 8, 2, 5]


def test_each_tile_of_the_pixels_has_its_scale_factor(tiny_processor, image_of):
    images = [image_of(*SIZE), image_of(32, 32), image_of(32, 64)]
    inputs = tiny_processor(images, "<image><image><image>", scale_factor=[3, None, [1, 2, 4]])
    assert inputs["scale_factors"].dtype == torch.int64
    assert inputs["scale_factors"].tolist() == [3] * 7 + [2] + [1, 2, 4]  # 2 is the projector's own
    assert len(inputs["pixel_values"]) == 11
    assert "scale_factors" in tiny_processor.model_input_names
    assert "scale_factors" not in tiny_processor(text="no image")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.integers(8, 128), st.integers(8, 128))
def test_the_ids_count_what_the_layout_says_for_any_scale_factors(tiny_processor, image_of, data, height, width):
    num_tiles = tiny_processor.image_layout((height, width)).tile_grid.num_tiles
    factors = data.draw(st.lists(st.integers(1, 8), min_size=num_tiles, max_size=num_tiles))
    layout = tiny_processor.image_layout((height, width), scale_factor=factors)
    inputs = tiny_processor(image_of(height, width), "a<image>b", scale_factor=[factors])
    ids = inputs["input_ids"][0]
    assert len(ids) == layout.num_tokens + 2
    assert ids.count(tiny_processor.image_token_id) == sum((-(-8 // factor)) ** 2 for factor in factors)
    assert inputs["scale_factors"].tolist() == factors
    counted = tiny_processor._get_num_multimodal_tokens(image_sizes=[(height, width)], scale_factor=[factors])
    assert (counted.num_image_tokens, counted.num_image_patches) == ([layout.num_tokens], [num_tiles])


def test_the_model_answers_as_if_it_had_been_told_the_scale_factor_itself(tiny_model, tiny_processor, image_of):
    inputs = tiny_processor(image_of(*SIZE), "<image>\nwhat?", scale_factor=3, return_tensors="pt")
    said_once = tiny_model.generate(**inputs, max_new_tokens=8, do_sample=False)
    del inputs["scale_factors"]
    told = tiny_model.generate(**inputs, scale_factor=3, max_new_tokens=8, do_sample=False)
    assert torch.equal(said_once, told)
    with pytest.raises(ValueError, match=r"image tokens but the images give .* scale_factors that the processor gave"):
        tiny_model.generate(**inputs, max_new_tokens=8)


def test_tiles_of_different_scale_factors_are_packed_one_by_one(tiny_model, tiny_processor, image_of):
    inputs = tiny_processor(image_of(*SIZE), "<image>\nwhat?", scale_factor=[MIXED], return_tensors="pt")
    with torch.no_grad():
        packed = [
            tiny_model.get_image_features(tile[None], factor).pooler_output[0]
            for tile, factor in zip(inputs["pixel_values"], MIXED, strict=True)
        ]
        embeddings = tiny_model.get_input_embeddings()(inputs["input_ids"])
        places = (inputs["input_ids"][0] == tiny_processor.image_token_id).nonzero()[:, 0]
        for place, token in zip(places, torch.cat(packed), strict=True):
            embeddings[0, place] = token
        slow = tiny_model.model.language_model(inputs_embeds=embeddings).last_hidden_state
        fast = tiny_model.model(**inputs).last_hidden_state
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=0)
    alone = tiny_model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert alone.shape[1] == inputs["input_ids"].shape[1] + 4


@pytest.mark.parametrize(
    ("scale_factor", "message"),
    [
        ([2, None], "scale_factor has 2 entries for 1 images; give one number for all, or a list with one entry per"),
        ([2, 2], "2 scale factors were given for the 7 tiles of an image, a grid of 2x3 and a thumbnail; give one"),
        ([[2, 2]], "2 scale factors were given for the 7 tiles of an image, a grid of 2x3 and a thumbnail; give one"),
        ([[9] * 7], "scale_factor=9 exceeds patch_grid=8x8"),
        ([[2.5] * 7], "scale_factor=2.5 must be an integer of at least 1"),
        (float("nan"), "scale_factor=nan must be an integer of at least 1"),
        ("2", "scale_factor='2' must be an integer of at least 1"),
        (True, "scale_factor=True must be an integer of at least 1"),
        ({"image": 2}, "scale_factor={'image': 2} must be an integer of at least 1"),
    ],
)
def test_scale_factors_that_fit_nothing_are_refused(tiny_processor, image_of, scale_factor, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        tiny_processor(image_of(*SIZE), "<image>", scale_factor=scale_factor)


@pytest.mark.parametrize(
    "form", [MIXED, tuple(MIXED), np.array(MIXED), [np.array(MIXED)], [np.int64(factor) for factor in MIXED]]
)
def test_the_numbers_of_one_images_tiles_may_stand_alone_and_be_numpys(tiny_processor, image_of, form):
    expected = tiny_processor(image_of(*SIZE), "<image>", scale_factor=[MIXED])
    inputs = tiny_processor(image_of(*SIZE), "<image>", scale_factor=form)
    assert inputs["input_ids"] == expected["input_ids"]
    assert inputs["scale_factors"].tolist() == MIXED


@pytest.mark.parametrize("options", [{"scale_factor": "bogus"}, {"max_tiles": -1}, {"scale_factor": [2, 2]}])
def test_options_are_checked_without_an_image_too(tiny_processor, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        tiny_processor(text="no image", **options)
    fitting = {"scale_factor": np.int64(2), "max_tiles": 4}
    assert tiny_processor(text="no image", **fitting) == tiny_processor(text="no image")
    assert tiny_processor(text="no image", scale_factor=[]) == tiny_processor(text="no image")


@pytest.mark.parametrize(
    ("projector", "expected"),
    [
        ({"name": "mlp"}, [1]),
        ({"name": "resampler", "query_grid": [4, 4], "num_heads": 4}, [2]),
        ({"name": "resampler", "query_grid": [5, 3], "num_heads": 4}, None),
    ],
)
def test_a_projector_without_a_scale_factor_says_the_one_that_its_tokens_amount_to(
    tiny_processor, image_of, projector, expected
):
    processor = TokenPackerProcessor(
        tiny_processor.image_processor,
        tiny_processor.tokenizer,
        patch_grid=(8, 8),
        projector_config={"vision_dim": 32, "language_dim": 32, **projector},
    )
    inputs = processor(image_of(32, 32), "<image>")
    assert expected == (inputs["scale_factors"].tolist() if "scale_factors" in inputs else None)


def test_a_budget_is_kept_by_tiles_of_different_scale_factors_or_refused(tiny_processor, image_of):
    layout = tiny_processor.image_layout(SIZE, scale_factor=MIXED)
    image, cost = image_of(*SIZE), layout.num_tokens
    inputs = tiny_processor(image, "<image>", scale_factor=[MIXED], max_image_tokens=cost)
    assert len(inputs["input_ids"][0]) == cost
    with pytest.raises(ValueError, match=f"max_image_tokens={cost - 1} is too small: the image costs {cost} tokens"):
        tiny_processor(image, "<image>", scale_factor=[MIXED], max_image_tokens=cost - 1)


def test_the_processors_settings_are_not_changed_by_a_call(tiny_processor, image_of):
    before = copy.deepcopy(tiny_processor.to_dict())
    tiny_processor(image_of(*SIZE), "<image>", scale_factor=[MIXED], image_mode="slice", max_tiles=6)
    assert tiny_processor.to_dict() == before
