"""Suggestions for misspelt names, and texts that no tokenizer takes."""

import pytest

from tokenpacker.text import check_text, did_you_mean


def test_the_nearest_word_is_suggested_where_one_is_close():
    assert did_you_mean("tinny", ["small", "tiny"]) == "; did you mean tiny?"
    assert did_you_mean("xyzzy", ["tiny", "small"]) == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [(7, "the line is given as int; pass a string"), ("a\ud83d", "the line has U\\+D83D at character 2")],
)
def test_what_is_no_text_is_refused_with_its_name(text, message):
    assert check_text("a \U0001f600") == "a \U0001f600"
    with pytest.raises(ValueError, match=f"^{message}"):
        check_text(text, "the line")
