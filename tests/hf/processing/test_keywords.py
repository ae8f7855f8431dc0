"""Keywords of the processor and the image processor: transformers' own forms, and no name without an effect."""

import re

import numpy as np
import pytest
import torch

from tokenpacker.hf import TokenPackerImageProcessor


@pytest.fixture
def picture(image_of):
    return image_of(64, 64)


def num_tokens(inputs):
    return len(inputs["input_ids"][0])


def test_options_are_taken_flat_and_nested_alike(tiny_processor, picture):
    flat = tiny_processor(picture, "<image>", max_tiles=1, scale_factor=4, max_length=40, padding="max_length")
    nested = tiny_processor(
        picture,
        "<image>",
        images_kwargs={"max_tiles": 1, "scale_factor": 4},
        text_kwargs={"max_length": 40, "padding": "max_length"},
    )
    assert flat["input_ids"] == nested["input_ids"]
    assert len(flat["pixel_values"]) == len(nested["pixel_values"]) == 1
    assert num_tokens(flat) == 40
    assert isinstance(
        tiny_processor(picture, "<image>", common_kwargs={"return_tensors": "pt"})["input_ids"], torch.Tensor
    )
    as_arrays = tiny_processor(picture, "<image>", return_tensors="np")
    assert all(isinstance(value, np.ndarray) for value in as_arrays.values())


def test_padding_goes_where_it_is_asked_for(tiny_processor, picture):
    left, right = (
        tiny_processor([[picture], []], ["<image>", "a"], padding=True, padding_side=side, return_tensors="pt")
        for side in ("left", "right")
    )
    assert left["attention_mask"][1].nonzero().flatten().tolist() == [left["input_ids"].shape[1] - 1]
    assert right["attention_mask"][1].nonzero().flatten().tolist() == [0]


def test_an_option_that_is_given_twice_is_refused(tiny_processor, picture):
    with pytest.raises(ValueError, match="max_tiles was passed two times"):
        tiny_processor(picture, "<image>", max_tiles=1, images_kwargs={"max_tiles": 2})


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"max_tile": 1}, "TokenPackerProcessor has no option 'max_tile'; did you mean max_tiles?"),
        ({"paddingside": "left"}, "has no option 'paddingside'; did you mean padding_side?"),
        ({"images_kwargs": {"scale": 2}}, "images_kwargs of TokenPackerProcessor has no option 'scale'; did you mean"),
        (
            {"text_kwargs": {"max_tiles": 2}},
            "text_kwargs of TokenPackerProcessor has no option 'max_tiles'; did you mean",
        ),
        ({"common_kwargs": {"max_tiles": 2}}, "has no option 'max_tiles'; it has return_tensors"),
        ({"images_kwargs": 3}, "images_kwargs=3 must be a dict of keywords"),
        ({"size": {"height": 8, "width": 8}}, "TokenPackerProcessor has no option 'size'; did you mean"),
        ({"do_resize": False}, "TokenPackerProcessor has no option 'do_resize'; did you mean"),
        ({"videos": ["clip.mp4"]}, "TokenPackerProcessor takes images and text, no videos; leave it out"),
        ({"max_tiles": "two"}, "max_tiles"),
        ({"max_tiles": float("nan")}, "max_tiles"),
        ({"max_tiles": 0}, "max_tiles=0 must be an integer of at least 1"),
        ({"image_mode": "cut"}, "image_mode"),
        ({"max_image_tokens": -3}, "max_image_tokens=-3 must be an integer of at least 1"),
        ({"padding_side": "middle"}, "padding_side"),
        ({"return_overflowing_tokens": True}, "return_overflowing_tokens=True cannot be honoured beside images"),
    ],
)
def test_a_name_or_value_that_cannot_be_is_refused_in_one_line(tiny_processor, picture, keywords, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        tiny_processor(picture, "<image>", **keywords)
    assert "\n" not in str(error.value)


def test_the_image_processor_refuses_unknown_names_in_calls_and_settings():
    with pytest.raises(ValueError, match="TokenPackerImageProcessor has no option 'max_tile'; did you mean max_tiles"):
        TokenPackerImageProcessor(max_tile=1)
    with pytest.raises(ValueError, match="has no option 'image_size'; did you mean"):
        TokenPackerImageProcessor().preprocess([], image_size=3)


def test_every_option_of_the_image_processor_may_be_given_to_a_call(image_of):
    picture, processor = image_of(60, 40), TokenPackerImageProcessor(tile_size=(32, 32))
    for options in (
        {"image_mode": "pad"},
        {"max_tiles": 1},
        {"tile_size": [16, 48]},
        {"antialias": False},
        {"thumbnail_source": "canvas"},
        {"do_rescale": False},
        {"rescale_factor": -1.0},
        {"do_normalize": False},
        {"image_mean": [0.0] * 3, "image_std": [1.0] * 3},
    ):
        expected = TokenPackerImageProcessor(**{"tile_size": (32, 32), **options})(picture)["pixel_values"]
        assert torch.equal(processor(picture, **options)["pixel_values"], expected), options
        shape = processor(picture)["pixel_values"].shape
        assert expected.shape != shape or not torch.equal(expected, processor(picture)["pixel_values"]), options


def test_channels_are_kept_where_no_conversion_is_wanted(image_of):
    four = np.dstack([np.array(image_of(20, 20))] * 2)[..., :4]
    keeps = TokenPackerImageProcessor("square", (8, 8), do_convert_rgb=False, image_mean=[0.0] * 4, image_std=[1.0] * 4)
    assert keeps(four)["pixel_values"].shape == (1, 4, 8, 8)
    with pytest.raises(ValueError, match="image_mean has 3 and image_std 4 entries for an image of 4 channels"):
        keeps(four, image_mean=[0.0] * 3)


def test_the_place_of_an_arrays_channels_can_be_said():
    rows_of_three = np.zeros((3, 40, 4), dtype=np.uint8)  # 3 rows of 40 pixels with transparency, or 40 of 4 in RGB
    processor = TokenPackerImageProcessor(tile_size=(8, 8), image_mode="square")
    sizes = [
        processor(rows_of_three, input_data_format=name)["image_sizes"].tolist()
        for name in ("channels_first", "channels_last", None)
    ]
    assert sizes == [[[40, 4]], [[3, 40]], [[3, 40]]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("<image>\nwhat?", "IMAGE"), "text is given as Image; pass a string or a list of strings; images come before"),
        ((["<image> a"], ["IMAGE"]), "text is given as list; pass a string or a list of strings; images come before"),
        (("<image>\nwhat?", "photo.jpg"), "images come before text: processor(images, text)"),
        (("IMAGE", 7), "text is given as int; pass a string or a list of strings"),
        (("IMAGE", float("nan")), "text is given as float; pass a string or a list of strings"),
        (("IMAGE", []), "text is given as an empty list; pass a string or a list of strings"),
        (("IMAGE", [None]), "text is given as list; pass a string or a list of strings"),
        ((), "You need to provide at least one input to call TokenPackerProcessor"),
        ((float("nan"), "<image>"), "an image given as float is not supported; pass a path"),
        (([None], "<image>"), "an image given as NoneType is not supported"),
    ],
)
def test_arguments_in_the_wrong_place_or_of_no_use_are_named(tiny_processor, picture, arguments, message):
    def put(value):
        return [put(entry) for entry in value] if isinstance(value, list) else picture if value == "IMAGE" else value

    with pytest.raises(ValueError, match=re.escape(message)) as error:
        tiny_processor(*map(put, arguments))
    assert "\n" not in str(error.value)


def test_images_alone_give_what_the_image_processor_gives(tiny_processor, picture):
    alone = tiny_processor(images=picture)
    assert set(alone) == {"pixel_values", "scale_factors"}
    assert torch.equal(alone["pixel_values"], tiny_processor.image_processor(picture)["pixel_values"])
