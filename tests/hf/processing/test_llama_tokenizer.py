import json
import re
import shutil
import subprocess
import sys

import pytest
import sentencepiece
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tokenpacker.hf import TokenPackerImageProcessor, TokenPackerProcessor
from tokenpacker.hf.processing.llama_tokenizer import encode_as_trained, load_llama_tokenizer
from tokenpacker.hf.processing.prompts import ImageTokens, encode_prompts

VARIANTS = ("slow", "slow_legacy", "fast")
EXTRAS = ("<im_patch>", "<im_start>", "<im_end>")
MARKS = ("<image>", "<s>", "</s>", "<unk>")

property_test = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
words = st.sampled_from(
    ["USER: hi", "the", "of", " a", " ", "  ", "\n", "\t", "▁", "\x00", "é", "你", "🚢", "1234", "<"]
)
texts = st.lists(st.one_of(st.sampled_from(MARKS), words, st.text(max_size=6)), max_size=8).map("".join)


PLAIN = """
import json, sys
from transformers import AutoTokenizer
print(json.dumps(AutoTokenizer.from_pretrained(sys.argv[1])("<image>\\nhow many?").input_ids))
"""


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "tokenizer"


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(folder, variant):
    return load_llama_tokenizer(folder, variant)


@pytest.fixture(scope="module")
def reloaded(tokenizer, tmp_path_factory):
    saved = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(saved)
    return AutoTokenizer.from_pretrained(saved)


@pytest.fixture(scope="module")
def cases(golden):
    return json.loads((golden / "text/text.json").read_text())


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def with_image_id(tokenizer, ids):
    """The original's ids, in which -200 stands for an image."""
    return [tokenizer.convert_tokens_to_ids("<image>") if token == -200 else token for token in ids]


def original_ids(processor, tokenizer, variant, text):
    """The rule of the original, slowly: texts between images one by one, in each the parts between special tokens."""
    specials = {"<unk>": 0, "<s>": 1, "</s>": 2}
    ids = []
    for number, chunk in enumerate(text.split("<image>")):
        ids += [tokenizer.convert_tokens_to_ids("<image>")] if number else []
        chunk = chunk.replace("▁", " ") if variant == "slow" else chunk
        for place, part in enumerate(re.split("(<s>|</s>|<unk>)", chunk)):
            if part in specials:
                ids.append(specials[part])
                continue
            pieces = processor.encode(part, out_type=str)
            if variant == "slow" and place and pieces and not part.startswith(" "):
                pieces[0] = pieces[0].removeprefix("▁")
            ids += [processor.piece_to_id(piece) for piece in pieces if piece]
    return ids


@pytest.fixture(scope="module")
def processor(folder):
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@property_test
@given(texts)
@example(" <image>\n ")
@example("<image><image>")
@example("a</s>USER: b<unk>of</s>")
def test_any_text_gets_the_ids_that_sentencepiece_and_the_originals_rule_give(
    processor, tokenizer, reloaded, variant, text
):
    expected = original_ids(processor, tokenizer, variant, text)
    assert encode_as_trained(tokenizer, text) == expected
    if variant != "slow" or not re.search("(<s>|</s>|<unk>)[^ ▁]", text):
        for one in (tokenizer, reloaded):
            assert ids_of(one, "<s>" + text) == [1, *expected]
            assert text.startswith("<s>") or one(text).input_ids == [1, *expected]


def test_prompts_get_the_originals_ids_in_one_call(cases, tokenizer, reloaded, variant):
    untruncated = [case for case in cases["conversations"] if case["model_max_length"] > 1000]
    for case in untruncated:
        expected = case["slow"] if case[variant] == "same as slow" else case[variant]
        expected = with_image_id(tokenizer, expected["input_ids"])
        for one in (tokenizer, reloaded):
            assert one(case["prompt"]).input_ids == expected, case["name"]
            assert ids_of(one, "<s>" + case["prompt"]) == expected, case["name"]


def test_texts_around_images_get_the_originals_ids(cases, tokenizer, reloaded, variant):
    for case in cases["tokenizer_image_token"]:
        for one in (tokenizer, reloaded):
            assert one(case["prompt"]).input_ids == with_image_id(one, case[variant]), case["prompt"]


def test_the_separators_have_the_originals_ids(cases, tokenizer, variant):
    expected = cases["separator_ids"][variant]
    assert tokenizer.convert_tokens_to_ids(["\n"]) == expected["ids_newline"]
    assert tokenizer.convert_tokens_to_ids([","]) == expected["ids_comma"]
    assert tokenizer("\n").input_ids == expected["encode_newline"]
    assert tokenizer("a\nb").input_ids == expected["encode_a_newline_b"]
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == expected["len"]


def reads_alike_in_all_variants(ids):
    """The stored texts come from sentencepiece, which shifts spaces around special tokens (ids up to 2)."""
    return min(ids) > 2


def test_generated_ids_read_as_they_did(golden, tokenizer, reloaded):
    cases = json.loads((golden / "model/cases.json").read_text())["cases"].values()
    generated = [case for case in cases if reads_alike_in_all_variants(case.get("generated_ids", [0]))]
    assert generated
    for case in generated:
        assert tokenizer.decode(case["generated_ids"]) == case["generated_text"]
        assert reloaded.decode(case["generated_ids"]) == case["generated_text"]


byte_pieces, pieces = st.integers(3, 258), st.integers(3, 599)


@property_test
@given(
    ids=st.lists(
        st.one_of(byte_pieces, pieces, st.sampled_from("你é🚢\n".encode()).map(lambda byte: byte + 3)), max_size=12
    )
)
@example(ids=[145, 124])
@example(ids=[byte + 3 for byte in "你".encode() + "你".encode()[:2]])
@example(ids=[byte + 3 for byte in "🚢".encode()[:3] + b"\n"])
def test_any_ids_read_as_sentencepiece_reads_them(tokenizer, reloaded, processor, ids):
    marks = {tokenizer.convert_tokens_to_ids("<image>")}
    ids = [index for index in ids if index not in marks]
    expected = processor.decode(ids)
    for one in (tokenizer, reloaded):
        assert one.decode(ids) == one.decode([1, *ids], skip_special_tokens=True) == expected
        assert one.batch_decode([ids, [145, 124]]) == [expected, "�y"]


def test_where_the_package_is_not_imported_a_saved_tokenizer_is_a_plain_one_with_the_same_ids(folder, tmp_path):
    tokenizer = load_llama_tokenizer(folder)
    tokenizer.save_pretrained(tmp_path)
    plain = subprocess.run(
        [sys.executable, "-c", PLAIN, str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout.splitlines()[-1]
    assert json.loads(plain) == tokenizer("<image>\nhow many?").input_ids


@property_test
@given(st.text(max_size=40).filter(lambda text: not any(mark in text for mark in MARKS)))
def test_any_text_survives_encoding_and_decoding(tokenizer, text):
    text = text.replace("▁", " ")
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


region_texts = st.lists(st.one_of(st.sampled_from([*MARKS[1:], "<mask>"]), words, st.text(max_size=6)), max_size=8)


@pytest.fixture(scope="module")
def region_processor(folder, variant):
    tokenizer = load_llama_tokenizer(folder, variant, region_token=True)
    images = TokenPackerImageProcessor(image_mode="pad", tile_size=(32, 32))
    projector = {"name": "mlp", "vision_dim": 8, "language_dim": 8}
    return TokenPackerProcessor(images, tokenizer, patch_grid=(2, 2), projector_config=projector)


@property_test
@given(region_texts)
@example(["what ", "<mask>", "of", "</s>", "the"])
@example(["<mask>", " a", "<mask>", "USER: hi"])
def test_a_prompt_gets_the_ids_of_training_whether_it_brings_its_start_token_or_not(region_processor, image_of, parts):
    text = "<image>" + "".join(parts)
    regions = [[[0, 0, 8, 8]] * text.count("<mask>")]
    bare, started, by_template = (
        region_processor(image_of(8, 8), prompt, region_masks=regions, **options)["input_ids"][0]
        for prompt, options in ((text, {}), ("<s>" + text, {}), ("<s>" + text, {"add_special_tokens": False}))
    )
    trained = encode_as_trained(region_processor.tokenizer, text)
    mark = region_processor.image_token_id
    assert bare == started == by_template == [1, mark, mark, mark, *trained]
    told = region_processor(image_of(8, 8), text, region_masks=regions, return_offsets_mapping=True)
    assert told["input_ids"][0] == bare
    assert len(told["offset_mapping"][0]) == len(bare)


@pytest.mark.parametrize(("kind", "key"), [("fast", "input_ids"), ("slow", "input_ids_slow_tokenizer")])
def test_prompts_with_regions_get_the_originals_ids(folder, golden, kind, key):
    tokenizer = load_llama_tokenizer(folder, kind, extra_tokens=["<mask>"])
    cases = json.loads((golden / "osprey/cases.json").read_text())["model"]
    for name in ("generate_1x1", "generate_2x2"):
        expected = cases[name][key] if kind == "slow" else cases[name][key][0]
        for prompt in (cases[name]["prompt"], "<s>" + cases[name]["prompt"]):
            mark = tokenizer.convert_tokens_to_ids("<image>")
            given = encode_prompts(tokenizer, [prompt], [[ImageTokens([mark], ["<image>"])]], mark, {})
            assert given["input_ids"] == [with_image_id(tokenizer, expected)], name


def test_a_start_token_is_not_added_where_none_is_wanted(region_processor):
    assert region_processor(text="the", add_special_tokens=False)["input_ids"] == [
        encode_as_trained(region_processor.tokenizer, "the")
    ]


def test_the_image_mark_takes_the_id_of_a_byte_that_no_text_contains(tokenizer, processor):
    assert tokenizer.convert_tokens_to_ids("<image>") == processor.piece_to_id("<0xFF>")
    assert tokenizer("<image>").input_ids == [1, processor.piece_to_id("<0xFF>")]
    assert len(tokenizer) == processor.get_piece_size()


def test_in_a_text_without_an_image_the_mark_is_ordinary_text(tokenizer, processor):
    assert encode_as_trained(tokenizer, "a <image>", image_marks=False) == processor.encode("a <image>")


def test_the_folder_says_which_variant_it_was_trained_with(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    legacy = ids_of(load_llama_tokenizer(folder, "slow_legacy"), "a</s>USER")
    sound = ids_of(load_llama_tokenizer(folder, "slow"), "a</s>USER")
    assert legacy != sound
    for flag, expected in (({"legacy": False}, sound), ({"legacy": True}, legacy), ({}, legacy)):
        config.pop("legacy", None)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | flag))
        assert ids_of(load_llama_tokenizer(tmp_path), "a</s>USER") == expected


def test_a_saved_tokenizer_loads_as_a_folder_of_its_own(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = load_llama_tokenizer(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    text = "<s>USER: <image>\nhi ASSISTANT: ok</s>USER: a</s>"
    assert ids_of(again, text) == ids_of(tokenizer, text)


def test_added_tokens_keep_the_folders_ids_and_missing_ones_follow(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<im_end>": 601, "<im_start>": 600}))
    tokenizer = load_llama_tokenizer(tmp_path, extra_tokens=["<im_start>", "<mask>"])
    assert tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>", "<mask>"]) == [600, 601, 602]
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert ids_of(again, "a <mask> b") == ids_of(tokenizer, "a <mask> b")


@pytest.mark.parametrize(("variant", "spaces"), [("slow", False), ("slow_legacy", False), ("fast", True)])
def test_only_the_slow_variants_drop_the_spaces_around_an_added_token(folder, variant, spaces):
    tokenizer = load_llama_tokenizer(folder, variant, extra_tokens=EXTRAS)
    for encode in (lambda text: ids_of(tokenizer, text), lambda text: encode_as_trained(tokenizer, text)):
        assert (encode("a \n<im_start> </s>") != encode("a<im_start></s>")) == spaces


def test_defaults_suit_batched_generation(tokenizer, reloaded):
    for one in (tokenizer, reloaded):
        assert one.padding_side == "left"
        assert one.pad_token_id == one.unk_token_id
        assert one.model_max_length == 2048
        batch = one(["a", "a b c"], padding=True)
        assert batch["input_ids"][0][0] == 0
        assert batch["attention_mask"][0][0] == 0


def broken(folder, path, name, content):
    shutil.copytree(folder, path, dirs_exist_ok=True)
    if content is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", None, "has neither tokenizer.model nor tokenizer.json; copy one of them there"),
        ("tokenizer.model", b"", "holds no BPE vocabulary"),
        ("tokenizer.model", b"\xff" * 40, "cannot be read as a sentencepiece model; fetch it again"),
        ("tokenizer_config.json", b"{", "is not valid JSON"),
        ("tokenizer_config.json", b"[]", "holds no JSON object"),
        ("tokenizer_config.json", b'{"add_bos_token": false}', "sets add_bos_token"),
        ("added_tokens.json", b'{"<mask>": 700}', "wants id 700, but the next free one is 600"),
        ("added_tokens.json", b'{"<s>": 600}', "gives '<s>' the ids 1 and 600"),
    ],
)
def test_a_broken_folder_is_named(folder, tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as error:
        load_llama_tokenizer(broken(folder, tmp_path, name, content))
    assert "\n" not in str(error.value)


def test_a_truncated_vocabulary_is_refused(folder, tmp_path):
    whole = (folder / "tokenizer.model").read_bytes()
    with pytest.raises(ValueError, match=r"tokenizer\.model"):
        load_llama_tokenizer(broken(folder, tmp_path, "tokenizer.model", whole[: len(whole) // 2]))


def test_the_vocabulary_must_fit_the_model(folder):
    assert len(load_llama_tokenizer(folder, vocab_size=600)) == 600
    with pytest.raises(ValueError, match="has 600 tokens but the model's vocab_size=599"):
        load_llama_tokenizer(folder, vocab_size=599)


def test_an_unknown_variant_is_refused(folder):
    with pytest.raises(ValueError, match="variant='quick' is unknown; use one of slow, slow_legacy, fast, or None"):
        load_llama_tokenizer(folder, "quick")
