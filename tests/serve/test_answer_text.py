"""The pieces of an answer join to its text, whatever its tokens are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenpacker.hf import TokenPackerProcessor, carried_model_path, load_llama_tokenizer
from tokenpacker.serve.embedded.answer_text import AnswerText


@pytest.fixture(scope="module")
def tokenizers(tiny_tokenizer, tokenizer_folder):
    """Bytes, byte-level merges, and LLaMA's pieces, words that begin with a space, and bytes."""
    carried = TokenPackerProcessor.from_pretrained(carried_model_path()).tokenizer
    return tiny_tokenizer, carried, load_llama_tokenizer(tokenizer_folder)


def pieces_of(tokenizer, ids, stop=()):
    """The pieces until a stop text, or with the last one until the end."""
    text = AnswerText(tokenizer, stop)
    pieces = []
    for token in ids:
        pieces.append(text.push(token))
        if text.stopped:
            return pieces
    return [*pieces, text.finish()]


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True).lstrip()


@given(st.integers(0, 2), st.lists(st.integers(0, 10**6), max_size=40))
def test_pieces_of_any_tokens_join_to_the_decoded_answer(tokenizers, kind, numbers):
    tokenizer = tokenizers[kind]
    ids = [number % len(tokenizer) for number in numbers]
    assert "".join(pieces_of(tokenizer, ids)) == decoded(tokenizer, ids)


@given(st.integers(0, 2), st.text(max_size=30))
def test_pieces_of_a_text_join_to_it_and_end_between_characters(tokenizers, kind, text):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == decoded(tokenizer, ids)
    assert "\ufffd" in decoded(tokenizer, ids) or "\ufffd" not in "".join(pieces)


@given(
    st.integers(0, 2),
    st.text("ab \n", max_size=20),
    st.lists(st.text("ab \n", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_an_answer_ends_before_the_first_stop_text_that_its_tokens_complete(tokenizers, kind, text, stop):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text, add_special_tokens=False)
    expected = decoded(tokenizer, ids)
    for length in range(1, len(ids) + 1):
        begun = decoded(tokenizer, ids[:length])
        places = [begun.index(one) for one in stop if one in begun]
        if places:
            expected = begun[: min(places)]
            break
    assert "".join(pieces_of(tokenizer, ids, stop)) == expected


def test_text_is_held_back_only_while_it_may_begin_a_stop_text(tiny_tokenizer):
    ids = tiny_tokenizer.encode("one ENemy END two", add_special_tokens=False)
    pieces = pieces_of(tiny_tokenizer, ids, ["END"])
    assert pieces == [*"one ", "", "", "ENe", *"my ", "", "", ""]


def test_a_character_of_several_tokens_comes_whole(tiny_tokenizer):
    ids = tiny_tokenizer.encode("a€b", add_special_tokens=False)
    assert pieces_of(tiny_tokenizer, ids) == ["a", "", "", "€", "b", ""]
    assert pieces_of(tiny_tokenizer, ids[:3]) == ["a", "", "", "\ufffd"]
