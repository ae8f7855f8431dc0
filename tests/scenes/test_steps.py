import copy

import pytest
import torch

from tokenpacker.carried.vocabulary import train_tokenizer
from tokenpacker.hf.processing.chat import chat_template
from tokenpacker.scenes.dense_labels import HEADS
from tokenpacker.scenes.steps import Steps, StepSpec
from tokenpacker.sequence import IGNORED


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def described(tokenizer, **changes) -> Steps:
    usual = {"scale_factors": (2, 3, 4), "captions": 0.2, "tokens_per_step": 1200}
    spec = StepSpec(show="labels", **usual | changes)
    return Steps(spec, tokenizer, num_steps=8, seed=0)


def test_a_step_depends_on_seed_and_index_alone(tokenizer):
    first, again = described(tokenizer)[3], described(tokenizer)[3]
    assert all(torch.equal(first[key], again[key]) for key in first if torch.is_tensor(first[key]))
    other = Steps(described(tokenizer).spec, tokenizer, num_steps=8, seed=1)[3]
    assert first["input_ids"].shape != other["input_ids"].shape or not first["input_ids"].equal(other["input_ids"])


def test_placeholders_are_as_many_as_packed_tokens(tokenizer):
    steps = described(tokenizer)
    for index in range(len(steps)):
        step = steps[index]
        places = int((step["input_ids"] == steps.image_token_id).sum())
        assert places == len(step["patch_labels"]) * (12 // step["scale_factor"]) ** 2
        assert step["patch_labels"].shape[1:] == (len(HEADS), 12, 12)


def test_scale_factors_are_drawn_per_step(tokenizer):
    steps = described(tokenizer)
    assert {steps[index]["scale_factor"] for index in range(len(steps))} == {2, 3, 4}


def test_tiles_of_a_mixed_step_draw_their_own_scale_factors(tokenizer):
    mixed = [described(tokenizer, mixed_share=1.0)[index] for index in range(6)]
    for step in mixed:
        assert "scale_factor" not in step
        assert len(step["scale_factors"]) == len(step["patch_labels"])
        places = int((step["input_ids"] == tokenizer.convert_tokens_to_ids("<image>")).sum())
        assert places == sum((12 // factor) ** 2 for factor in step["scale_factors"].tolist())
    assert set(torch.cat([step["scale_factors"] for step in mixed]).tolist()) == {2, 3, 4}


def test_without_a_share_nothing_is_mixed_and_steps_are_those_of_before(tokenizer):
    plain, none = described(tokenizer)[2], described(tokenizer, mixed_share=0.0)[2]
    assert plain["scale_factor"] == none["scale_factor"]
    assert torch.equal(plain["input_ids"], none["input_ids"])


def test_paced_alike_steps_show_the_same_pictures_at_every_scale_factor(tokenizer):
    def labels(scale_factor, paced_at):
        steps = described(tokenizer, scale_factors=(scale_factor,), paced_at=paced_at, easy_share=0.0)
        return [steps[index]["patch_labels"] for index in range(3)]

    for one, two in zip(labels(1, 2), labels(4, 2), strict=True):
        torch.testing.assert_close(one, two)
    assert sum(map(len, labels(1, None))) < sum(map(len, labels(4, None)))


def test_a_caption_step_learns_descriptions(tokenizer):
    steps = described(tokenizer, captions=1.0, easy_share=0.0)
    step = steps[0]
    learned = tokenizer.decode(step["labels"][0][step["labels"][0] != IGNORED])
    assert learned.endswith(".</s>")
    assert "the " in learned


def test_pixels_come_from_official_images_and_generated_ones(tokenizer):
    pytest.importorskip("easy_vqa", reason="the easy-vqa package is not installed")
    spec = StepSpec(show="pixels", captions=0.0, scale_factors=(2,), tokens_per_step=600, easy_share=1.0, max_images=4)
    step = Steps(spec, tokenizer, num_steps=1, seed=0)[0]
    assert step["pixel_values"].shape == (4, 3, 96, 96)


def test_training_tiles_are_those_of_the_processor(tokenizer):
    """One look at an image in training and in use: the same tiles from the same picture."""
    from tokenpacker.carried.encoder import IMAGE_MEAN, IMAGE_STD
    from tokenpacker.hf.processing.image_processor import TokenPackerImageProcessor
    from tokenpacker.scenes import FinePrint
    from tokenpacker.scenes.steps import Steps, StepSpec, _Shown
    from tokenpacker.tiling import choose_tile_grid

    image = FinePrint("train")[0].image
    processor = TokenPackerImageProcessor(
        tile_size=(96, 96), image_mean=[IMAGE_MEAN] * 3, image_std=[IMAGE_STD] * 3, image_mode="slice"
    )
    grid = choose_tile_grid((image.height, image.width), (96, 96))
    steps = Steps(StepSpec(show="pixels", captions=1.0, scale_factors=(2,)), tokenizer, num_steps=1, seed=0)
    shown = steps._show(_Shown("", (), image=image, grid=grid))
    torch.testing.assert_close(shown, processor([image])["pixel_values"], atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def region_processor():
    """Of the carried model, taught the `<mask>` token."""
    from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor, add_regions
    from tokenpacker.hub import carried_model_path

    folder = carried_model_path()
    processor = TokenPackerProcessor.from_pretrained(folder)
    add_regions(TokenPackerForConditionalGeneration.from_pretrained(folder), processor)
    return processor


def marked(processor, num_steps=6, **changes) -> Steps:
    usual = {"scale_factors": (4,), "captions": 0.2, "tokens_per_step": 900, "max_images": 3, "show": "labels"}
    spec = StepSpec(**usual | {"regions": 1.0} | changes)
    return Steps(spec, processor.tokenizer, num_steps=num_steps, seed=0, processor=processor)


def test_a_step_about_regions_has_as_many_regions_as_marks(region_processor):
    steps = marked(region_processor)
    for index in range(len(steps)):
        step = steps[index]
        num_marks = int((step["input_ids"] == region_processor.region_token_id).sum())
        assert len(step["region_cells"]) == len(step["region_first_tile"]) == num_marks > 0
        assert (step["region_cells"].sum(dim=(1, 2)) > 0).all()


def test_a_mark_gets_the_patches_of_the_object_that_is_asked_about(region_processor):
    """What is under the mask in the patch labels is what the answer says: in every tile, row, place and form."""
    steps, tokenizer = marked(region_processor, num_steps=8), region_processor.tokenizer
    names, checked = ["", *HEADS["color"]], 0
    color = list(HEADS).index("color")
    for step in (steps[index] for index in range(len(steps))):
        regions = iter(zip(step["region_cells"], step["region_first_tile"].tolist(), strict=True))
        for ids in step["input_ids"]:
            for text in tokenizer.decode(ids).split("</s>"):
                question, _, answer = text.partition(" ASSISTANT: ")
                asked = [next(regions) for _ in range(question.count("<mask>"))]
                if "what color" in question and "box" not in question:
                    for (cells, first), name in zip(asked, answer.split(", "), strict=True):
                        labels = step["patch_labels"][first : first + len(cells), color].flatten(1)  # (P, L)
                        seen = [float(cells[labels == number].sum()) for number in range(1, len(names))]
                        checked += 1
                        assert max(range(len(seen)), key=seen.__getitem__) == names.index(name) - 1, question
        assert next(regions, None) is None
    assert checked > 50


def test_a_model_is_asked_in_the_form_that_it_learns(region_processor):
    marked(region_processor)
    asks_otherwise = copy.copy(region_processor)
    asks_otherwise.chat_template = chat_template(format="v1")
    with pytest.raises(ValueError, match=r"would be asked .<s>A chat between .*; set model\.chat_format=bare"):
        marked(asks_otherwise)


def test_a_share_of_the_steps_is_about_regions_and_the_others_are_as_ever(region_processor):
    steps = marked(region_processor, num_steps=40, regions=0.5, easy_share=1.0, max_images=2)
    counts = [len(steps[index]["region_cells"]) for index in range(len(steps))]
    assert 10 <= counts.count(0) <= 30  # 20 and three standard deviations of a fair coin
    idle = steps[counts.index(0)]
    assert idle["region_first_tile"].shape == (0,)
    assert idle["region_cells"].shape[2] == 144


def test_without_regions_steps_are_those_of_a_model_that_takes_none(region_processor):
    known, unknown = marked(region_processor, regions=None)[2], described(region_processor.tokenizer)
    plain = Steps(marked(region_processor, regions=None).spec, unknown.tokenizer, num_steps=6, seed=0)[2]
    assert set(known) - set(plain) == {"region_cells", "region_first_tile"}
    assert all(torch.equal(known[key], plain[key]) for key in plain if torch.is_tensor(plain[key]))


def test_regions_without_a_model_that_takes_them_are_refused(tokenizer):
    spec = StepSpec(show="labels", captions=0.0, scale_factors=(2,), regions=0.5)
    with pytest.raises(ValueError, match=r"regions=0.5 needs a model that takes regions"):
        Steps(spec, tokenizer, num_steps=1, seed=0)
