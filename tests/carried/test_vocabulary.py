import pytest

from tokenpacker.carried.vocabulary import train_tokenizer
from tokenpacker.scenes import easy_vqa, fine_print


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.mark.parametrize(
    "text", ["USER: <image>\nwhat number is in the red box? ASSISTANT: 42</s>", "two  spaces, a tab\t.", "größe 猫 !?"]
)
def test_any_text_survives_encoding_and_decoding(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_every_answer_word_is_one_token(tokenizer):
    words = [*fine_print.WORDS, *fine_print.FRAME_COLORS, *fine_print.SHAPES, *easy_vqa.COLORS, "yes", "no"]
    assert [word for word in words if len(tokenizer.tokenize(f" {word}")) != 1] == []


def test_digits_and_separators_are_single_tokens(tokenizer):
    assert len(tokenizer.tokenize(" 42")) == 2
    for separator in (",", "\n"):
        assert len(tokenizer(separator, add_special_tokens=False).input_ids) == 1


def test_a_question_encodes_alike_alone_and_within_a_prompt(tokenizer):
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    question = "is there a circle? ASSISTANT:"
    assert encode("USER: <image>\n" + question) == encode("USER: <image>\n") + encode(question)


def test_special_tokens_have_the_ids_of_llama(tokenizer):
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_other_texts_make_another_tokenizer_of_the_same_rules():
    made = train_tokenizer([" zeppelin"] * 4, vocabulary_size=400)
    assert len(made.tokenize(" zeppelin")) == 1 < len(made.tokenize(" number"))
    assert (made.unk_token_id, made.bos_token_id, made.eos_token_id) == (0, 1, 2)
