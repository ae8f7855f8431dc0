import json

import pytest

from example_batches import batch_of
from tokenpacker.data.labels import expand, merge_image_marks, prepare_example, render_prompt
from tokenpacker.hf.processing.llama_tokenizer import load_llama_tokenizer
from tokenpacker.sequence import IGNORED, ImageLayout
from tokenpacker.tiling import TileGrid

QUESTION = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}]


@pytest.fixture(scope="module", params=["slow", "slow_legacy", "fast"])
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(golden, variant):
    return load_llama_tokenizer(golden / "tokenizer", variant)


@pytest.fixture(scope="module")
def cases(golden):
    return json.loads((golden / "text/text.json").read_text())


def prepare(case, tokenizer):
    return prepare_example(
        case["conversation"],
        tokenizer,
        has_image=case["has_image"],
        format=case["template"],
        max_length=case["model_max_length"],
    )


def with_image_id(tokenizer, ids):
    """The original's ids, in which -200 stands for an image."""
    return [tokenizer.convert_tokens_to_ids("<image>") if token == -200 else token for token in ids]


def test_ids_and_labels_are_the_originals(cases, tokenizer, variant):
    for case in cases["conversations"]:
        expected = case["slow"] if case[variant] == "same as slow" else case[variant]
        example = prepare(case, tokenizer)
        assert list(example.input_ids) == with_image_id(tokenizer, expected["input_ids"]), case["name"]
        assert list(example.labels) == with_image_id(tokenizer, expected["labels"]), case["name"]
        printed = expected.get("printed", "")
        assert bool(example.problem) == bool(printed), case["name"]
        for count in [word.strip(".") for word in printed.split() if word.strip(".").isdigit()]:
            assert count in example.problem.split(";")[0].replace(",", "").split()


def test_prompts_are_the_originals(cases, tokenizer):
    for case in cases["conversations"]:
        merged = merge_image_marks(case["conversation"]) if case["has_image"] else case["conversation"]
        assert merged == case["after_preprocess_multimodal"], case["name"]
        assert render_prompt(merged, tokenizer, case["template"]) == f"<s>{case['prompt']}", case["name"]


def test_batches_are_the_originals(golden, cases):
    slow = load_llama_tokenizer(golden / "tokenizer", "slow")
    by_name = {case["name"]: case for case in cases["conversations"]}
    for case in cases["collator"]:
        batch = batch_of([prepare(by_name[name], slow) for name in case["conversations"]], 0, case["model_max_length"])
        assert batch["input_ids"].tolist() == [with_image_id(slow, row) for row in case["input_ids"]]
        assert batch["labels"].tolist() == case["labels"]
        assert batch["attention_mask"].tolist() == [[int(seen) for seen in row] for row in case["attention_mask"]]


def test_expanded_batches_are_the_originals(golden):
    slow = load_llama_tokenizer(golden / "tokenizer", "slow")
    mark, comma = slow.convert_tokens_to_ids(["<image>", ","])
    cases = json.loads((golden / "model/cases.json").read_text())["cases"]
    cases = {name: case for name, case in cases.items() if "expanded_labels" in case}
    assert cases
    for name, case in cases.items():
        side = 24 // case["scale_factor"]
        examples = []
        for row, conversation in enumerate(case["conversations"]):
            has_image = any("<image>" in message["value"] for message in conversation)
            example = prepare_example(conversation, slow, has_image=has_image)
            grid = TileGrid(case["h_block"][row], case["w_block"][row])
            layout = ImageLayout(grid, (side, side), separators=case["mode"] == "slice")
            images = [layout.token_ids(mark, comma, slow.unk_token_id)] * has_image
            examples.append(expand(example, mark, images))
        batch = batch_of(examples, slow.pad_token_id)
        for key, padding in (("labels", IGNORED), ("attention_mask", 0)):
            for row, expected in zip(batch[key].tolist(), case[f"expanded_{key}"], strict=True):
                # The original padded before it expanded, so it has as much or more padding at the end.
                padded = row + [padding] * (len(expected) - len(row))
                assert padded == [int(value) for value in expected], (name, key)


def test_only_answers_and_their_end_marks_are_learned(tokenizer):
    turns = [*QUESTION, {"from": "human", "value": "sure?"}, {"from": "gpt", "value": "yes, a cat"}]
    example = prepare_example(turns, tokenizer, has_image=True)
    assert tokenizer.decode([label for label in example.labels if label != IGNORED]) == "a cat</s> yes, a cat</s>"


def test_images_of_a_message_become_one_mark_before_the_text():
    turns = [{"from": "human", "value": " and <image> <image>? "}, {"from": "gpt", "value": "<image>"}]
    assert [turn["value"] for turn in merge_image_marks(turns)] == ["<image>\nand  ?", "<image>"]
    assert merge_image_marks(turns, image_start_end=True)[1]["value"] == "<im_start><image><im_end>"


def test_a_text_without_an_image_may_speak_of_the_mark(tokenizer):
    turns = [{"from": "human", "value": "what does <image> mean?"}, {"from": "gpt", "value": "an image"}]
    example = prepare_example(turns, tokenizer, has_image=False)
    assert tokenizer.convert_tokens_to_ids("<image>") not in example.input_ids
    assert example.problem is None


def test_training_and_inference_see_the_same_ids(tokenizer):
    """What the model reads before its answer is what the chat template and one tokenizer call give."""
    example = prepare_example(QUESTION, tokenizer, has_image=True)
    prompt = render_prompt(QUESTION, tokenizer).removesuffix(" a cat</s>")
    read = tokenizer(prompt, add_special_tokens=False).input_ids
    first = next(place for place, label in enumerate(example.labels) if label != IGNORED)
    assert list(example.input_ids[:first]) == read


def test_an_expanded_image_is_read_and_not_learned(tokenizer):
    mark = tokenizer.convert_tokens_to_ids("<image>")
    example = prepare_example(QUESTION, tokenizer, has_image=True)
    expanded = expand(example, mark, [[mark, mark, 0]])
    place = example.input_ids.index(mark)
    assert expanded.input_ids == (*example.input_ids[:place], mark, mark, 0, *example.input_ids[place + 1 :])
    assert expanded.labels[place : place + 3] == (IGNORED,) * 3
    assert expanded.attention_mask[place : place + 3] == (1, 1, 1)
    assert expanded.labels[place + 3 :] == example.labels[place + 1 :]


def test_marks_and_images_must_agree(tokenizer):
    example = prepare_example(QUESTION, tokenizer, has_image=True)
    with pytest.raises(ValueError, match="image_ids has 2 images for 1 marks; pass one entry for each mark"):
        expand(example, tokenizer.convert_tokens_to_ids("<image>"), [[1], [2]])


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([], "must be a list of at least one message"),
        (["hi"], "message 1 must be a dict with the keys 'from' and 'value'"),
        ([{"from": "human"}], "message 1 must be a dict"),
        ([QUESTION[0], {"from": "bot", "value": "a"}], "message 2 is from 'bot'; use 'human' or 'gpt'"),
        ([QUESTION[0], {"from": "gpt", "value": 3}], "the value of message 2 is given as int; pass a string"),
        ([QUESTION[1]], "has no message from 'human'"),
        ([QUESTION[0], QUESTION[0]], "message 2 is from 'human', where 'gpt' is due"),
        ([QUESTION[1], QUESTION[1]], "message 2 is from 'gpt', where 'human' is due"),
    ],
)
def test_a_malformed_conversation_names_its_message(tokenizer, conversation, message):
    with pytest.raises(ValueError, match=message):
        prepare_example(conversation, tokenizer, has_image=True)


def test_a_caption_needs_two_messages_and_an_image(tokenizer):
    with pytest.raises(ValueError, match="the plain format needs 2 messages, not 1"):
        prepare_example(QUESTION[:1], tokenizer, has_image=True, format="plain")
    with pytest.raises(ValueError, match="message 1 of the plain format has no <image>"):
        prepare_example([{"from": "human", "value": "?"}, QUESTION[1]], tokenizer, has_image=True, format="plain")
    with pytest.raises(ValueError, match="format='v2' has no labels; use 'v1', 'bare' or 'plain'"):
        prepare_example(QUESTION, tokenizer, has_image=True, format="v2")


@pytest.mark.parametrize("start", [{}, {"bos_token": "<s>"}], ids=["no start token", "a start token"])
def test_other_tokenizers_learn_the_answers_and_their_ends_too(start):
    """A space belongs to the word behind it, as with GPT-2's kin; Qwen's have no start token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<pad>", "<image>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġa", "Ġb"]
    backend = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, [("Ġ", "a"), ("Ġ", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        **start,
    )
    talk = [*QUESTION, {"from": "human", "value": "None?"}, {"from": "gpt", "value": "bats"}]
    example = prepare_example(talk, tokenizer, has_image=True)
    assert example.problem is None
    assert tokenizer.decode([label for label in example.labels if label != IGNORED]) == " a cat</s> bats</s>"
    assert tokenizer.decode(example.input_ids).startswith("<s>A chat" if start else "A chat")
