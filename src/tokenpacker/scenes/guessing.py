"""How far one gets without looking: the most frequent answer to a question, from the training questions alone."""

from collections import Counter, defaultdict
from collections.abc import Iterable

from tokenpacker.scenes.scene import Question


def guess_accuracy(training: Iterable[Question], testing: Iterable[Question]) -> tuple[int, int]:
    """(right, asked) of the best guess by a question's exact wording, else by its kind."""
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
