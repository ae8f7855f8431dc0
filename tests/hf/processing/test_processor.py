import base64
import copy
import functools
import json

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packaging.version import Version
from transformers import AutoProcessor
from transformers.processing_utils import TextKwargs

from tokenpacker.hf import VICUNA_SYSTEM, TokenPackerProcessor, chat_template
from tokenpacker.hf.processing.image_processor import RELEASED_OPTIONS
from tokenpacker.images import ImageError


def image_tokens(processor, input_ids):
    return int((input_ids == processor.image_token_id).sum())


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([None, 1, 2, 3, 4]), st.sampled_from(["slice", "pad"]))
def test_the_count_equals_the_length_really_used(tiny_processor, image_of, height, width, scale_factor, mode):
    picture = image_of(height, width)
    layout = tiny_processor.image_layout((height, width), scale_factor=scale_factor, image_mode=mode)
    empty = tiny_processor(text="ab")["input_ids"][0]
    inputs = tiny_processor(picture, "a<image>b", scale_factor=scale_factor, image_mode=mode)
    assert len(inputs["input_ids"][0]) - len(empty) == layout.num_tokens
    packed = layout.tile_grid.num_tiles * layout.tokens_per_tile
    assert inputs["input_ids"][0].count(tiny_processor.image_token_id) == packed
    assert inputs["pixel_values"].shape[0] == layout.tile_grid.num_tiles


def test_images_of_a_batch_come_in_the_order_of_their_markers(tiny_processor, image_of):
    first, second, third = (image_of(32, 32, seed) for seed in range(3))
    nested = tiny_processor([[first], [], [second, third]], ["<image>a", "b", "<image>c<image>"], return_tensors="pt")
    flat = tiny_processor([first, second, third], ["<image>a", "b", "<image>c<image>"], return_tensors="pt")
    assert torch.equal(nested["pixel_values"], flat["pixel_values"])
    assert nested["pixel_values"].shape[0] == 3
    assert [image_tokens(tiny_processor, row) for row in nested["input_ids"]] == [16, 0, 32]


def test_batches_are_padded_on_the_left(tiny_processor, image_of):
    inputs = tiny_processor([[image_of(32, 32)], []], ["<image>a", "b"], return_tensors="pt")
    assert inputs["attention_mask"][0].all()
    assert inputs["attention_mask"][1].tolist() == [0] * (inputs["input_ids"].shape[1] - 1) + [1]


def test_the_budget_bounds_each_image(tiny_processor, image_of):
    free = tiny_processor(image_of(96, 96), "<image>", return_tensors="pt")
    bound = tiny_processor(image_of(96, 96), "<image>", max_image_tokens=60, return_tensors="pt")
    assert bound["input_ids"].shape[1] <= 60 < free["input_ids"].shape[1]


@pytest.mark.parametrize(
    ("num_images", "text", "message"),
    [
        (
            1,
            "what is this?",
            "the number of <image> tokens in the prompts should be the same as the number of images: 0 markers, 1",
        ),
        (1, "<image><image> same?", "2 markers, 1 images"),
        (0, "<image> what?", "1 markers, 0 images"),
    ],
)
def test_markers_and_images_must_agree(tiny_processor, image_of, num_images, text, message):
    with pytest.raises(ValueError, match=message):
        tiny_processor([image_of(8, 8)] * num_images or None, text)


def test_in_a_batch_the_wrong_prompt_is_named(tiny_processor, image_of):
    with pytest.raises(ValueError, match="prompt 1 needs as many <image> markers as images: 1 markers, 0 images"):
        tiny_processor([[], [image_of(8, 8)]], ["<image>", "b"])
    with pytest.raises(ValueError, match="1 lists of images for 2 prompts"):
        tiny_processor([[image_of(8, 8)]], ["<image>", "b"])


def test_a_scale_factor_that_cannot_be_is_refused(tiny_processor, image_of):
    with pytest.raises(ValueError, match="scale_factor=9 exceeds patch_grid=8x8"):
        tiny_processor(image_of(8, 8), "<image>", scale_factor=9)


def test_a_budget_too_small_is_refused(tiny_processor, image_of):
    with pytest.raises(ValueError, match="max_image_tokens=5 is too small: one tile costs 17 tokens"):
        tiny_processor(image_of(8, 8), "<image>", max_image_tokens=5)


def test_truncation_would_cut_images_and_is_refused(tiny_processor, image_of):
    with pytest.raises(ValueError, match="truncation would cut images apart"):
        tiny_processor(image_of(8, 8), "<image>", truncation=True, max_length=4)


def test_truncation_that_leaves_every_image_whole_cuts_the_text(tiny_processor, image_of):
    whole = tiny_processor(image_of(8, 8), "<image>and a long text")["input_ids"][0]
    cut = tiny_processor(image_of(8, 8), "<image>and a long text", truncation=True, max_length=20)["input_ids"][0]
    assert cut == whole[:20]
    short = tiny_processor(image_of(8, 8), "<image>a", truncation=True, max_length=500)["input_ids"][0]
    assert short == tiny_processor(image_of(8, 8), "<image>a")["input_ids"][0]


def test_an_engine_learns_what_a_call_makes_before_it_calls(tiny_processor, image_of):
    sizes = [(100, 100), (300, 100), (500, 30), (8, 8)]
    for options in ({}, {"scale_factor": 3}, {"max_image_tokens": 60}, {"max_tiles": 2, "image_mode": "pad"}):
        counted = tiny_processor._get_num_multimodal_tokens(image_sizes=sizes, **options)
        calls = [tiny_processor(image_of(*size), "<image>", **options) for size in sizes]
        assert counted.num_image_tokens == [len(call["input_ids"][0]) for call in calls]
        assert counted.num_image_patches == [len(call["pixel_values"]) for call in calls]
        assert counted.num_image_patches == [len(call["scale_factors"]) for call in calls]
    assert tiny_processor._get_num_multimodal_tokens().num_image_tokens is None
    with pytest.raises(ValueError, match="has no option 'max_tile'; did you mean max_tiles"):
        tiny_processor._get_num_multimodal_tokens(image_sizes=sizes, max_tile=2)


@pytest.mark.parametrize("row_separator", ["newline", "unknown"])
def test_the_place_of_each_image_is_told_with_its_exact_ids_and_a_text(tiny_processor, image_of, row_separator):
    processor = processor_like(tiny_processor, row_separator=row_separator)
    prompt, images = "a, <image>\nb<image>", [image_of(64, 64), image_of(32, 32)]
    inputs = processor(
        images,
        prompt,
        scale_factor=[[1, 2, 3, 4, 4], 2],
        max_tiles=4,
        return_text_replacement_offsets=True,
        return_mm_token_type_ids=True,
        return_offsets_mapping=True,
    )
    ids, [told] = inputs["input_ids"][0], inputs["text_replacement_offsets"]
    expanded = prompt
    for entry in reversed(told):
        expanded = expanded[: entry["span"][0]] + entry["replacement"] + expanded[entry["span"][1] :]
    assert [expanded[slice(*entry["new_span"])] for entry in told] == [entry["replacement"] for entry in told]
    assert ids == [*ids[:3], *told[0]["token_ids"], *ids[-19:-17], *told[1]["token_ids"]]
    assert [len(entry["token_ids"]) for entry in told] == [64 + 16 + 9 + 4 + 4 + 5, 17]
    kinds = inputs["mm_token_type_ids"][0]
    assert kinds == [0] * 3 + [1] * 102 + [0] * 2 + [1] * 17  # the comma of the text is none of the image's
    pieces = [expanded[start:end] for start, end in inputs["offset_mapping"][0]]
    assert "".join(pieces) == expanded
    assert {piece for piece, kind in zip(pieces, kinds, strict=True) if kind} <= {"<image>", ",", "\n", "<unk>"}


def test_offsets_are_about_the_prompt_as_it_was_given_where_nobody_asks_for_replacements(tiny_processor, image_of):
    prompt = "a<image>b"
    inputs = tiny_processor(image_of(32, 32), prompt, return_offsets_mapping=True)
    pieces = [prompt[start:end] for start, end in inputs["offset_mapping"][0]]
    assert pieces == ["a", *["<image>"] * 17, "b"]


def test_what_a_tokenizer_alone_does_not_pad_is_padded_too(tiny_processor, image_of):
    inputs = tiny_processor(
        [[image_of(32, 32)], []],
        ["<image>a", "b"],
        padding=True,
        return_tensors="pt",
        return_mm_token_type_ids=True,
        return_offsets_mapping=True,
    )
    assert inputs["mm_token_type_ids"].shape == inputs["input_ids"].shape
    assert inputs["mm_token_type_ids"].sum(1).tolist() == [17, 0]
    assert inputs["offset_mapping"][1].tolist() == [[0, 0]] * 17 + [[0, 1]]


def test_a_broken_image_is_named(tiny_processor, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"")
    with pytest.raises(ImageError, match=r"broken\.png"):
        tiny_processor(str(path), "<image>")


def test_the_processor_survives_saving(tiny_processor, tiny_model_dir, image_of):
    again = AutoProcessor.from_pretrained(tiny_model_dir)
    assert isinstance(again, TokenPackerProcessor)
    text, picture = "USER: <image>\nhi", image_of(50, 70)
    for key, value in tiny_processor(picture, text, return_tensors="pt").items():
        assert torch.equal(again(picture, text, return_tensors="pt")[key], value)
    assert again.row_separator_id == tiny_processor.row_separator_id


def processor_like(processor, **changes):
    """The processor with other arguments."""
    same = {"patch_grid": processor.patch_grid, "projector_config": processor.projector_config}
    return TokenPackerProcessor(processor.image_processor, processor.tokenizer, **{**same, **changes})


def test_rows_end_with_a_newline_or_as_in_the_released_weights_with_the_unknown_token(tiny_processor, image_of):
    tokenizer = tiny_processor.tokenizer
    sound, released = tiny_processor, processor_like(tiny_processor, row_separator="unknown")
    assert sound.row_separator_id == tokenizer.encode("\n", add_special_tokens=False)[-1]
    assert released.row_separator_id == tokenizer.unk_token_id
    assert sound.tile_separator_id == released.tile_separator_id == tokenizer.convert_tokens_to_ids(",")
    newlines, unknowns = (each(image_of(64, 64), "<image>")["input_ids"][0] for each in (sound, released))
    assert [tokenizer.unk_token_id if i == sound.row_separator_id else i for i in newlines] == unknowns
    rows = released.image_layout((64, 64)).tile_grid.rows
    assert unknowns.count(tokenizer.unk_token_id) == rows + 1  # and the thumbnail


def test_the_row_separator_survives_saving_and_its_id_is_not_stored(tiny_processor, tmp_path):
    processor_like(tiny_processor, row_separator="unknown").save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "processor_config.json").read_text())
    assert stored["row_separator"] == "unknown"
    assert not any(name.endswith("separator_id") for name in stored)
    assert TokenPackerProcessor.from_pretrained(tmp_path).row_separator == "unknown"


def test_a_folder_that_still_stores_separator_ids_loads_where_they_say_the_same(tiny_processor, tmp_path):
    tiny_processor.save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    stored = json.loads(path.read_text())
    del stored["row_separator"]
    ids = {name: getattr(tiny_processor, name) for name in ("row_separator_id", "tile_separator_id")}
    path.write_text(json.dumps({**stored, **ids}))
    assert TokenPackerProcessor.from_pretrained(tmp_path).row_separator_id == tiny_processor.row_separator_id
    path.write_text(json.dumps({**stored, "row_separator_id": 0}))
    with pytest.raises(
        ValueError, match=r"has row_separator_id=0, but the tokenizer gives .* write row_separator='unk"
    ):
        TokenPackerProcessor.from_pretrained(tmp_path)


def test_a_row_separator_that_cannot_be_is_refused(tiny_processor):
    with pytest.raises(ValueError, match="row_separator='tab' is unknown; use 'newline' or 'unknown'"):
        processor_like(tiny_processor, row_separator="tab")
    without = copy.deepcopy(tiny_processor.tokenizer)
    without.unk_token = None
    with pytest.raises(ValueError, match="row_separator='unknown' needs a tokenizer with an unknown token"):
        TokenPackerProcessor(tiny_processor.image_processor, without, row_separator="unknown")


def test_the_layout_follows_the_image_processors_list_of_grids(tiny_model, tiny_tokenizer):
    build = functools.partial(TokenPackerProcessor.from_config, tiny_model.config, tiny_tokenizer, max_tiles=16)
    size = (32, 32 * 12)
    assert build().image_layout(size).tile_grid.cols == 12
    released = build(row_separator="unknown", **RELEASED_OPTIONS)
    assert released.image_layout(size).tile_grid.cols == 9
    assert released.image_processor.choose_grid(size) == released.image_layout(size).tile_grid


def conversation(*turns):
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": content} for number, content in enumerate(turns)]


def test_the_chat_format_is_vicunas(tiny_processor):
    messages = conversation([{"type": "image"}, {"type": "text", "text": "what is this?"}], "a cat", "what colour?")
    prompt = tiny_processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == "<s>USER: <image>\nwhat is this? ASSISTANT: a cat</s>USER: what colour? ASSISTANT:"


def test_a_system_text_comes_first(tiny_processor):
    messages = conversation("hi")
    with_default = tiny_processor.apply_chat_template(messages, chat_template=chat_template(VICUNA_SYSTEM))
    assert with_default == f"<s>{VICUNA_SYSTEM} USER: hi "
    own = [{"role": "system", "content": "Be brief."}, *messages]
    assert (
        tiny_processor.apply_chat_template(own, chat_template=chat_template(VICUNA_SYSTEM)) == "<s>Be brief. USER: hi "
    )


def test_chat_content_is_read_as_transformers_and_openai_write_it(tiny_processor, image_of, tmp_path):
    picture, path = image_of(40, 70), tmp_path / "picture.png"
    picture.save(path)
    encoded = base64.b64encode(path.read_bytes()).decode()
    address = f"data:image/png;base64,{encoded}"
    parts = [
        {"type": "image", "image": picture},
        {"type": "image", "path": str(path)},
        {"type": "image", "url": str(path)},
        {"type": "image", "base64": encoded},
        {"type": "image", "url": address},
        {"type": "image_url", "image_url": {"url": address}},
        {"type": "image_url", "image_url": address},
    ]
    made = [
        tiny_processor.apply_chat_template(
            conversation([part, {"type": "text", "text": "hi"}]),
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"max_tiles": 1, "scale_factor": 4},
        )
        for part in parts
    ]
    expected = tiny_processor(picture, "<s>USER: <image>\nhi ", max_tiles=1, scale_factor=4, return_tensors="pt")
    for inputs in made:
        assert inputs.keys() == expected.keys()
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)


def test_options_reach_the_processor_through_the_chat_template(tiny_processor, image_of):
    messages = conversation([{"type": "image", "image": image_of(64, 64)}, {"type": "text", "text": "hi"}])
    expected = tiny_processor(image_of(64, 64), "<s>USER: <image>\nhi ", scale_factor=4, max_tiles=1)["input_ids"]
    for options in (
        {"scale_factor": 4, "max_tiles": 1},
        {"processor_kwargs": {"scale_factor": 4, "max_tiles": 1}},
        {"processor_kwargs": {"images_kwargs": {"scale_factor": 4, "max_tiles": 1}}},
    ):
        inputs = tiny_processor.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
        assert inputs["input_ids"] == expected
    with pytest.raises(ValueError, match="has no option 'scale_facto'; did you mean scale_factor"):
        tiny_processor.apply_chat_template(messages, tokenize=True, scale_facto=4)


@pytest.mark.skipif("sanitize_control_tokens" not in TextKwargs.__annotations__, reason="newer than this transformers")
def test_a_mark_that_a_users_text_may_not_set_stands_for_no_image(tiny_processor, image_of):
    parts = [{"type": "image", "image": image_of(32, 32)}, {"type": "text", "text": "<image>"}]
    inputs = tiny_processor.apply_chat_template(
        conversation(parts), tokenize=True, return_dict=True, sanitize_control_tokens=True
    )
    ids = inputs["input_ids"][0]
    assert ids.count(tiny_processor.image_token_id) == 16
    assert tiny_processor.decode(ids[-len("<image> ") :]) == "<image> "


def test_conversations_of_a_batch_keep_their_own_images(tiny_processor, image_of):
    def ask(*images):
        return conversation([*({"type": "image", "image": image} for image in images), {"type": "text", "text": "hi"}])

    first, second, third = (image_of(32, 32, seed) for seed in range(3))
    chats = [ask(first), ask(), ask(second, third)]
    inputs = tiny_processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
    )
    assert [image_tokens(tiny_processor, row) for row in inputs["input_ids"]] == [16, 0, 32]
    assert torch.equal(inputs["pixel_values"], tiny_processor.image_processor([first, second, third])["pixel_values"])
    text_only = tiny_processor.apply_chat_template(ask(), tokenize=True, return_dict=True)
    assert set(text_only) == {"input_ids", "attention_mask"}


def test_a_final_message_can_be_continued(tiny_processor, image_of):
    messages = conversation([{"type": "image", "image": image_of(8, 8)}, {"type": "text", "text": "hi"}], "It is")
    inputs = tiny_processor.apply_chat_template(messages, continue_final_message=True, tokenize=True, return_dict=True)
    assert tiny_processor.decode(inputs["input_ids"][0][-5:]) == "It is"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "video", "url": "a.mp4"}, "a part of type 'video' cannot be read; use one of text, image, image_url"),
        ({"type": "input_image", "image_url": "SECRET"}, "a part of type 'input_image' cannot be read"),
        ({"text": "SECRET"}, "a part of the form dict without a type cannot be read"),
        ("SECRET", "a part of the form str without a type cannot be read"),
        ({"type": "text", "content": "SECRET"}, "a part of type 'text' has no text"),
        ({"type": "text", "text": ["SECRET"]}, "a part of type 'text' has no text"),
        ({"type": "image", "image_path": "SECRET"}, "a part of type 'image' has image_path beside its type, and so no"),
        ({"type": "image", "base64": "SECRET!"}, "base64 of an image part is no base64"),
        ({"type": "image", "base64": b"SECRET"}, "base64 of an image part is no base64"),
        ({"type": "image_url", "url": "SECRET"}, "a part of type 'image_url' has no address"),
        ({"type": "image_url", "image_url": {"uri": "SECRET"}}, "a part of type 'image_url' has no address"),
    ],
)
def test_a_part_that_cannot_be_read_is_refused_without_repeating_it(tiny_processor, part, message):
    for chat in (conversation([part]), [conversation("hi"), conversation([part])]):
        with pytest.raises(ValueError, match=message) as error:
            tiny_processor.apply_chat_template(chat, tokenize=False)
        assert "SECRET" not in str(error.value)


def test_a_mark_without_its_image_is_a_prompt_but_no_input(tiny_processor):
    chat = conversation([{"type": "image", "image": None}, {"type": "image"}, {"type": "text", "text": "hi"}])
    assert tiny_processor.apply_chat_template(chat) == "<s>USER: <image>\n<image>\nhi "
    with pytest.raises(ValueError, match="a part of type 'image' has nothing beside its type, and so no image; give"):
        tiny_processor.apply_chat_template(chat, tokenize=True, return_dict=True)


def test_tools_are_refused_where_the_template_has_no_place_for_them(tiny_processor):
    with pytest.raises(ValueError, match="tools were given, but the chat template has no place for them"):
        tiny_processor.apply_chat_template(conversation("hi"), tools=[{"type": "function"}])
    own = "{{ tools | length }}"
    assert (
        tiny_processor.apply_chat_template(conversation("hi"), chat_template=own, tools=[{"type": "function"}]) == "1"
    )


def test_the_start_token_is_written_once(tiny_processor, image_of):
    messages = conversation([{"type": "image", "image": image_of(8, 8)}, {"type": "text", "text": "hi"}])
    whole = tiny_processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    prompt = tiny_processor.apply_chat_template(messages)
    by_hand = tiny_processor(image_of(8, 8), prompt, return_tensors="pt")
    assert torch.equal(whole["input_ids"], by_hand["input_ids"])
    assert (whole["input_ids"] == tiny_processor.tokenizer.bos_token_id).sum() == 1


def test_the_answers_can_be_told_from_the_rest(tiny_processor, image_of):
    messages = conversation([{"type": "image", "image": image_of(8, 8)}, {"type": "text", "text": "hi"}], "yes")
    inputs = tiny_processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = inputs["input_ids"], inputs["assistant_masks"]
    ids, mask = (ids[0], mask[0]) if isinstance(ids[0], list) else (ids, mask)
    assert tiny_processor.decode([token for token, kept in zip(ids, mask, strict=True) if kept]) == "yes</s>"


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.19"),
    reason="transformers then looked for answers in offsets that padding leaves unsorted",
)
def test_answers_after_several_images_are_told_from_the_rest_in_a_padded_batch(tiny_processor, image_of):
    image = {"type": "image", "image": image_of(64, 64)}
    long = conversation([image, image, {"type": "text", "text": "hi"}], "yes", [image], "no, two")
    inputs = tiny_processor.apply_chat_template(
        [long, conversation("hi", "well")],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True, "padding_side": "right"},
    )
    masks = torch.as_tensor(inputs["assistant_masks"]).bool()
    told = [tiny_processor.decode(ids[mask]) for ids, mask in zip(inputs["input_ids"], masks, strict=True)]
    assert told == ["yes</s>no, two</s>", "well</s>"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\udcff", r"^the prompt has U\+DCFF at character 2, which is half a character .*; write it anew in UTF-8$"),
        (["fine", "\ud83d"], r"^prompt 2 has U\+D83D at character 1, which is half a character"),
        ([b"bytes"], "^text is given as list; pass a string"),
    ],
)
def test_what_is_no_text_is_named_before_a_tokenizer_sees_it(tiny_processor, text, message):
    with pytest.raises(ValueError, match=message):
        tiny_processor(text=text)
