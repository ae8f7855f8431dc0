from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from PIL import Image

from tokenpacker.data.labels import prepare_example
from tokenpacker.data.rows import Record, RecordError
from tokenpacker.data.samples import Length, SampleMaker
from tokenpacker.hf import TokenPackerProcessor
from tokenpacker.hf.processing.image_processor import RELEASED_OPTIONS, TokenPackerImageProcessor
from tokenpacker.hf.processing.llama_tokenizer import load_llama_tokenizer
from tokenpacker.sequence import IGNORED
from tokenpacker.tiling import TileGrid


@pytest.fixture
def maker(tiny_processor):
    return SampleMaker(tiny_processor)


@pytest.fixture
def picture_file(tmp_path, image_of):
    """Writes a picture of a size and gives its path: `picture_file(40, 90)`."""

    def write(height, width, seed=0):
        path = tmp_path / f"{height}x{width}-{seed}.png"
        image_of(height, width, seed).save(path)
        return str(path)

    return write


def talk(question, answer="a cat", *more):
    roles = ("human", "gpt")
    texts = (question, answer, *more)
    return tuple({"from": roles[place % 2], "value": text} for place, text in enumerate(texts))


def record(question, *images, answers=("a cat",), id="r"):
    return Record(id=id, conversation=talk(question, *answers), images=images)


def reject(maker, bad, decode=True):
    with pytest.raises(RecordError) as caught:
        maker.make(bad) if decode else maker.length(bad)
    assert caught.value.id == bad.id
    return caught.value


def same(first, second):
    """Whether two samples are equal bit for bit."""
    pairs = zip(*(vars(sample).values() for sample in (first, second)), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_a_sample_is_what_the_processor_makes_of_its_prompt(maker, tiny_processor, picture_file):
    path = picture_file(60, 90)
    sample = maker.make(record("<image>\nwhat?", path))
    prompt = tiny_processor.tokenizer.decode(
        prepare_example(talk("<image>\nwhat?"), tiny_processor.tokenizer, has_image=True).input_ids
    )
    expected = tiny_processor(images=Image.open(path), text=prompt, return_tensors="pt")
    assert torch.equal(sample.input_ids, expected["input_ids"][0])
    assert torch.equal(sample.pixel_values, expected["pixel_values"])
    assert sample.attention_mask.tolist() == [1] * len(sample.input_ids)
    assert len(sample.labels) == len(sample.input_ids)


def test_only_answers_are_learned(maker, tiny_processor, picture_file):
    sample = maker.make(record("<image>\nwhat?", picture_file(60, 90), answers=("a cat", "sure?", "yes")))
    learned = sample.labels[sample.labels != IGNORED]
    assert tiny_processor.tokenizer.decode(learned) == " a cat</s> yes</s>"
    assert sample.labels[0] == IGNORED
    assert set(sample.labels[sample.input_ids == tiny_processor.image_token_id].tolist()) == {IGNORED}


@pytest.mark.parametrize("images", [[], [(60, 90)], [(20, 200), (64, 64), (33, 31)]])
@pytest.mark.parametrize("scale_factor", [None, 4])
def test_lengths_are_exact_without_decoding(maker, tiny_processor, picture_file, images, scale_factor):
    paths = [picture_file(*size) for size in images]
    example = record("<image>\n" * len(paths) + "what?", *paths)
    length, sample = maker.length(example, scale_factor), maker.make(example, scale_factor)
    layouts = [tiny_processor.image_layout(size, scale_factor=scale_factor) for size in images]
    assert length == Length(
        tokens=len(sample.input_ids),
        image_tokens=sum(layout.num_tokens for layout in layouts),
        tiles=len(sample.pixel_values),
        images=len(images),
        regions=0,
    )
    assert sample.tile_grids == tuple(layout.tile_grid for layout in layouts)
    packed = sum(layout.tile_grid.num_tiles * layout.tokens_per_tile for layout in layouts)
    assert int((sample.input_ids == tiny_processor.image_token_id).sum()) == packed


def test_each_of_several_images_stands_in_its_own_place_with_its_own_grid(maker, tiny_processor, picture_file):
    paths = [picture_file(32, 32), picture_file(32, 96)]
    sample = maker.make(record("first <image> then", *paths, answers=("yes", "and <image>?", "no")))
    assert sample.tile_grids == (TileGrid(1, 1), TileGrid(1, 3))
    is_image = (sample.input_ids == tiny_processor.image_token_id).tolist()
    decode = tiny_processor.tokenizer.decode
    first = is_image.index(True)
    assert decode(sample.input_ids[:first]).endswith("USER: first ")
    own = tiny_processor.image_layout((32, 32)).num_tokens
    between = decode(sample.input_ids[first + own :])
    assert between.startswith(" then ASSISTANT: yes</s>USER: and <image>")
    assert decode(sample.labels[sample.labels != IGNORED]) == " yes</s> no</s>"
    tiles = [maker.make(record("<image>", path)).pixel_values for path in paths]
    assert torch.equal(sample.pixel_values, torch.cat(tiles))


def test_the_marks_of_a_single_image_follow_the_released_rule(maker, picture_file):
    path = picture_file(60, 90)
    merged = maker.make(record("<image>\nwhat is it?", path))
    assert same(maker.make(record("what is <image>it?", path)), merged)


def test_released_ids_and_labels_come_out_for_one_image(golden, picture_file):
    tokenizer = load_llama_tokenizer(golden / "tokenizer", "slow")
    images = TokenPackerImageProcessor(max_tiles=9, **RELEASED_OPTIONS)
    processor = TokenPackerProcessor(images, tokenizer, row_separator="unknown")
    example = record("<image>\nwhat?", picture_file(336, 672))
    sample = SampleMaker(processor).make(example)
    plain = prepare_example(example.conversation, tokenizer, has_image=True)
    mark = plain.input_ids.index(processor.image_token_id)
    layout = processor.image_layout((336, 672))
    assert sample.input_ids[:mark].tolist() == list(plain.input_ids[:mark])
    assert sample.input_ids[mark + layout.num_tokens :].tolist() == list(plain.input_ids[mark + 1 :])
    assert sample.labels[mark + layout.num_tokens :].tolist() == list(plain.labels[mark + 1 :])
    assert sample.attention_mask.all()  # the separator `<unk>` is no padding


def test_a_text_only_sample_has_no_tiles(maker, tiny_processor):
    sample = maker.make(record("what is 2 + 2?", answers=("4",)))
    assert sample.pixel_values.shape == (0, 3, *tiny_processor.image_processor.tile_size)
    assert sample.tile_grids == ()


def test_captions_are_learned_whole(tiny_processor, picture_file):
    sample = SampleMaker(tiny_processor, "plain").make(record("tell me\n<image>", picture_file(32, 32)))
    assert tiny_processor.tokenizer.decode(sample.labels[sample.labels != IGNORED]) == "a cat\n"


def test_the_same_record_makes_the_same_sample(maker, picture_file):
    example = record("<image>\nwhat?", picture_file(60, 90))
    assert same(maker.make(example), maker.make(example))


def test_encoded_bytes_are_images_too(maker, picture_file):
    path = picture_file(60, 90)
    with open(path, "rb") as file:
        from_bytes = record("<image>\nwhat?", file.read())
    assert same(maker.make(from_bytes), maker.make(record("<image>\nwhat?", path)))


@pytest.mark.parametrize(
    ("question", "num_images"), [("what?", 1), ("<image><image>", 3), ("<image> <image> <image>", 2), ("<image>?", 0)]
)
def test_images_and_marks_that_differ_in_number_are_rejected(maker, picture_file, question, num_images):
    bad = record(question, *[picture_file(32, 32)] * num_images)
    assert reject(maker, bad, decode=False).kind == "images and marks differ"


def test_a_mark_lost_with_a_message_that_the_model_opens_is_noticed(maker, picture_file):
    talk_from_gpt = ({"from": "gpt", "value": "<image>"}, *talk("what?"))
    bad = Record(id="r", conversation=talk_from_gpt, images=(picture_file(32, 32),))
    assert "0 image marks for 1 images" in reject(maker, bad).reason


@pytest.mark.parametrize("text", ["<image>", "what </s> now?", "say ASSISTANT: yes", "is <unk> known?"])
def test_a_conversation_of_which_nothing_would_be_learned_is_rejected(maker, picture_file, text):
    question = text if "<image>" in text else f"<image>\n{text}"
    answers = ("",) if text == "<image>" else ("a cat",)
    error = reject(maker, record(question, picture_file(32, 32), answers=answers), decode=False)
    assert error.kind == "nothing to learn"


@pytest.mark.parametrize(
    "conversation", [({"from": "human", "value": "a"},) * 2, ({"from": "gpt", "value": "a"},)], ids=["order", "alone"]
)
def test_a_malformed_conversation_is_rejected(maker, conversation):
    assert reject(maker, Record(id="r", conversation=conversation)).kind == "malformed conversation"


def test_a_question_without_an_answer_teaches_nothing(maker):
    bad = Record(id="r", conversation=({"from": "human", "value": "what?"},))
    assert "no answer to learn" in reject(maker, bad).reason


def test_what_is_too_long_is_rejected_and_never_cut(tiny_processor, picture_file):
    example = record("<image>\nwhat?", picture_file(60, 90))
    length = SampleMaker(tiny_processor).length(example).tokens
    assert len(SampleMaker(tiny_processor, max_length=length).make(example).input_ids) == length
    error = reject(SampleMaker(tiny_processor, max_length=length - 1), example, decode=False)
    assert error.kind == "too long"
    assert f"{length} tokens, more than max_length={length - 1}" in error.reason


def test_a_missing_image_is_rejected(maker, tmp_path):
    error = reject(maker, record("<image>", str(tmp_path / "no.png")), decode=False)
    assert error.kind == "missing image"


def test_a_file_that_is_no_image_is_rejected_by_its_header(maker, tmp_path):
    for name, content in (("empty.png", b""), ("text.png", b"hello"), ("bytes", b"hello")):
        (tmp_path / name).write_bytes(content)
        image = content if name == "bytes" else str(tmp_path / name)
        assert reject(maker, record("<image>", image), decode=False).kind == "unreadable image"


def test_a_truncated_image_is_found_when_it_is_decoded(maker, picture_file, tmp_path):
    with open(picture_file(200, 200), "rb") as file:
        content = file.read()
    bad = record("<image>", content[: len(content) // 2])
    assert maker.length(bad).tiles > 1
    error = reject(maker, bad)
    assert error.kind == "unreadable image"
    assert "damaged" in error.reason


def test_an_image_with_too_many_pixels_is_rejected_by_its_header(maker, picture_file, monkeypatch):
    monkeypatch.setattr("tokenpacker.images.MAX_PIXELS", 60 * 90)
    assert maker.length(record("<image>", picture_file(60, 90))).tiles > 1
    error = reject(maker, record("<image>", picture_file(60, 91)), decode=False)
    assert "60x91, more than the 5,400 pixels allowed" in error.reason


def test_a_budget_bounds_each_image(tiny_processor, picture_file):
    images = [picture_file(100, 200), picture_file(200, 100)]
    example = record("<image> or <image>?", *images)
    free = SampleMaker(tiny_processor).length(example)
    bounded = SampleMaker(tiny_processor, max_image_tokens=50).length(example)
    assert bounded.image_tokens <= 100 < free.image_tokens


def test_what_no_sample_can_meet_is_refused_at_once(tiny_processor):
    with pytest.raises(ValueError, match="chat_format='v2' is unknown"):
        SampleMaker(tiny_processor, "v2")
    with pytest.raises(ValueError, match="max_length=0"):
        SampleMaker(tiny_processor, max_length=0)
    with pytest.raises(ValueError, match="max_image_tokens=3 is too small"):
        SampleMaker(tiny_processor, max_image_tokens=3)
    with pytest.raises(ValueError, match="scale_factor"):
        SampleMaker(tiny_processor).check_scale_factor(0)


def test_the_fingerprint_knows_every_setting_but_not_the_last_call(tiny_processor):
    first = SampleMaker(tiny_processor).fingerprint
    tiny_processor(text=["a", "a long one"], padding=True, return_tensors="pt")
    assert SampleMaker(tiny_processor).fingerprint == first
    others = [
        SampleMaker(tiny_processor, "plain"),
        SampleMaker(tiny_processor, max_length=9),
        SampleMaker(tiny_processor, max_image_tokens=50),
    ]
    assert len({first, *(maker.fingerprint for maker in others)}) == 4


def test_samples_are_frozen(maker):
    with pytest.raises(dataclasses.FrozenInstanceError):
        maker.make(record("hello?")).id = "other"


@pytest.mark.parametrize(
    ("image_mode", "region", "fits"),
    [
        ("slice", {"box": [0, 0, 9, 9]}, True),
        ("pad", {"box": [0, 0, 9, 9]}, True),
        ("square", {"box": [40, 0, 60, 20]}, True),
        ("square", {"box": [0, 0, 9, 9]}, False),  # in the part that is cut off
        ("slice", {"box": [96, 0, 99, 9]}, False),  # beside the image
    ],
)
def test_a_region_is_judged_alike_with_the_image_and_without(region_model, picture_file, image_mode, region, fits):
    processor = copy.deepcopy(region_model[1])
    processor.image_processor.image_mode = image_mode
    maker = SampleMaker(processor)
    marked = dataclasses.replace(record("<image>\nwhat is <mask>?", picture_file(32, 96)), regions=((region,),))
    if fits:
        assert maker.length(marked).regions == len(maker.make(marked).region_cells) == 1
    else:
        from_headers, from_pixels = reject(maker, marked, decode=False), reject(maker, marked)
        assert from_headers.kind == from_pixels.kind == "malformed region"
        assert str(from_headers) == str(from_pixels)
