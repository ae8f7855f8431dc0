"""`scale_factor="auto"` in a processor: exact counts before any model runs."""

import copy
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tokenpacker.hf import TokenPackerProcessor

ROUTER = {"scale_factors": [1, 2, 8], "detail": [1.0, 0.2], "thumbnail_detail": [1.0, 0.2]}
FIXTURES = [HealthCheck.function_scoped_fixture]


@pytest.fixture(scope="module")
def processor(tiny_processor):
    routed = copy.copy(tiny_processor)
    routed.router = ROUTER
    return routed


def half_blank(image: Image.Image) -> Image.Image:
    image.paste("white", (0, 0, image.width // 2, image.height))
    return image


def test_a_blank_image_costs_one_token_a_tile(processor):
    inputs = processor(Image.new("RGB", (96, 64), "red"), "<image>", scale_factor="auto", add_special_tokens=False)
    assert inputs["scale_factors"].tolist() == [8] * 7
    assert inputs["input_ids"][0].count(processor.image_token_id) == 7


def test_tiles_with_detail_get_more_tokens(processor, image_of):
    inputs = processor(half_blank(image_of(32, 64)), "<image>", scale_factor="auto")
    blank, full, _ = inputs["scale_factors"].tolist()
    assert (blank, full) == (8, 1)


def test_images_of_one_prompt_may_have_numbers_and_auto(processor, image_of):
    images = [image_of(32, 32), Image.new("RGB", (32, 32)), image_of(32, 32)]
    inputs = processor(images, "<image><image><image>", scale_factor=["auto", "auto", 4])
    assert inputs["scale_factors"].tolist() == [1, 8, 4]


@settings(max_examples=40, deadline=None, suppress_health_check=FIXTURES)
@given(st.integers(8, 128), st.integers(8, 128), st.integers(2, 400), st.integers(0, 3))
def test_a_budget_holds_for_any_image_and_the_count_is_exact(processor, image_of, height, width, budget, seed):
    image = half_blank(image_of(height, width, seed))
    plan = processor.plan_image(image, scale_factor="auto", max_image_tokens=budget)
    inputs = processor(
        image, "<image>", scale_factor="auto", max_image_tokens=budget, add_special_tokens=False, return_tensors="np"
    )
    assert plan.layout.num_tokens == inputs["input_ids"].shape[1] <= budget
    assert inputs["scale_factors"].tolist() == plan.scale_factors
    uncut = processor.image_layout((height, width), scale_factor=8).tile_grid
    if uncut.num_tiles * 2 <= budget:
        assert plan.layout.tile_grid == uncut  # no tile is left out as long as each can have one token


@pytest.mark.parametrize("options", [{"image_mode": "pad"}, {"image_mode": "square"}, {"max_tiles": 2}])
def test_other_ways_to_cut_work_too(processor, image_of, options):
    plan = processor.plan_image(image_of(40, 90), scale_factor="auto", **options)
    assert len(plan.scale_factors) == plan.layout.tile_grid.num_tiles
    assert all(reason.startswith("detail ") for reason in plan.reasons)


def test_the_padding_of_a_square_is_no_detail(processor):
    assert processor.plan_image(
        Image.new("RGB", (10, 90), "red"), scale_factor="auto", image_mode="pad"
    ).scale_factors == [8]


def test_the_model_answers_about_auto_inputs(processor, tiny_model, image_of):
    inputs = processor(half_blank(image_of(64, 96)), "<image>\nwhat?", scale_factor="auto", return_tensors="pt")
    assert len(set(inputs["scale_factors"].tolist())) > 1
    answer = tiny_model.generate(**inputs, max_new_tokens=3, do_sample=False)
    told = tiny_model.generate(
        **processor(
            half_blank(image_of(64, 96)), "<image>\nwhat?", scale_factor=[inputs["scale_factors"]], return_tensors="pt"
        ),
        max_new_tokens=3,
        do_sample=False,
    )
    assert torch.equal(answer, told)


def test_a_router_is_saved_and_loaded(processor, tmp_path, image_of):
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["router"] == ROUTER
    again = TokenPackerProcessor.from_pretrained(tmp_path)
    assert again.plan_image(image_of(64, 96), scale_factor="auto") == processor.plan_image(
        image_of(64, 96), scale_factor="auto"
    )


def test_a_processor_that_was_saved_without_the_key_has_no_router(tiny_processor, tmp_path, image_of):
    tiny_processor.save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    saved = json.loads(path.read_text())
    saved.pop("router", None)
    path.write_text(json.dumps(saved))
    old = TokenPackerProcessor.from_pretrained(tmp_path)
    assert old(image_of(32, 32), "<image>", scale_factor=2)["scale_factors"].tolist() == [2]
    for ask in (
        lambda: old(image_of(32, 32), "<image>", scale_factor="auto"),
        lambda: old.check_plan(scale_factor="auto"),
        lambda: old(text="no image", scale_factor="auto"),
    ):
        with pytest.raises(
            ValueError, match="needs thresholds that were fitted to the model, and this one has no router"
        ):
            ask()


def test_sizes_alone_are_refused(processor):
    with pytest.raises(ValueError, match="scale_factor='auto' needs an image's pixels, and got its size alone"):
        processor.image_layout((64, 96), scale_factor="auto")
    with pytest.raises(ValueError, match="scale_factor='auto' needs the pixels of images, and got their sizes"):
        processor._get_num_multimodal_tokens(image_sizes=[(64, 96)], scale_factor="auto")


def test_a_router_with_scale_factors_that_the_projector_cannot_have_says_so(processor, image_of):
    wrong = copy.copy(processor)
    wrong.router = ROUTER | {"scale_factors": [1, 2, 9]}
    with pytest.raises(ValueError, match="scale_factor=9 exceeds patch_grid=8x8"):
        wrong(image_of(32, 32), "<image>", scale_factor="auto")
