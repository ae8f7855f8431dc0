"""The accuracy of guessing: answering without looking at the image."""

from collections import Counter, defaultdict
from collections.abc import Iterable

from tokenpacker.scenes.scene import Question


def guess_accuracy(training: Iterable[Question], testing: Iterable[Question]) -> tuple[int, int]:
    """(right, asked) when every test question gets the most frequent answer of the training questions.

    That is the most frequent answer to the same text, or to its kind of question if the text is new.
    """
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    by_kind: dict[str, Counter[str]] = defaultdict(Counter)
    for question in training:
        by_text[question.text][question.answer] += 1
        by_kind[question.kind][question.answer] += 1
    right = asked = 0
    for question in testing:
        known = by_text.get(question.text) or by_kind.get(question.kind) or Counter()
        right += [question.answer] == [answer for answer, _ in known.most_common(1)]
        asked += 1
    return right, asked
