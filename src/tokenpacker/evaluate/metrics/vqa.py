"""VQA accuracy: an answer counts as right as far as people gave it, after the official normalisation.

Source: the evaluation code of VQA v2 (https://visualqa.org/evaluation.html), and for TextVQA and VizWiz its variant
of M4C, which LLaVA uses. Each of the N people is left out once: an answer that at least 3 of the others gave counts 1,
one that fewer gave counts a third for each.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.metrics.metric import Metric, mean_score

ENOUGH_PEOPLE = 3
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(value) for value, word in enumerate(WORDS)} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
MARKS = ';/[]"{}()=+\\_-><@`,?!'
THOUSANDS = re.compile(r"(?<=\d),+(?=\d)")
PERIODS = re.compile(r"\.(?!\d)")
_WITH_APOSTROPHES = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've he'd
"""
# As in the official table, which recognises a contraction without one of its apostrophes, and turns `somebody'd` round.
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _WITH_APOSTROPHES.split()
    for place, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}


def normalize_vqa(text: str) -> str:
    """The answer as the evaluation code of VQA v2 compares it."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return words_and_numbers(without_marks(text))


def normalize_m4c(text: str) -> str:
    """The answer as M4C's evaluator compares it: `'s` is a word, commas and question marks go first."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalize_vqa(text)


def without_marks(text: str) -> str:
    """Removes a mark that stands beside a space, or all of them if there is a thousands comma; others become spaces."""
    remove_all = THOUSANDS.search(text) is not None
    cleaned = text
    for mark in MARKS:
        remove = remove_all or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if remove else " ")
    return PERIODS.sub("", cleaned)


def words_and_numbers(text: str) -> str:
    """Lower case, number words as digits, no articles, apostrophes of contractions put back."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def agreement(matches: int, people: int) -> float:
    """Mean over all people of min(1, matches among the others / 3)."""
    with_self = min(1.0, max(0, matches - 1) / ENOUGH_PEOPLE)
    return (matches * with_self + (people - matches) * min(1.0, matches / ENOUGH_PEOPLE)) / people


class VqaMetric(Metric):
    """VQA accuracy, which compares with several people."""

    def check(self, question: BenchQuestion) -> None:
        """Raises ValueError for a question whose answer cannot be scored."""
        super().check(question)
        if len(question.answers) <= ENOUGH_PEOPLE:
            raise ValueError(
                f"question {question.id!r} has {len(question.answers)} reference answers, and {self.name} cannot be 1"
                f" with fewer than {ENOUGH_PEOPLE + 1}; give those of all people, or use the metric exact"
            )


def _vqa_metric(name: str, normalize: Callable[[str], str], description: str) -> VqaMetric:
    def rule(answer: str, question: BenchQuestion) -> float:
        wanted = [normalize(reference) for reference in question.answers]
        return agreement(wanted.count(normalize(answer)), len(wanted))

    return VqaMetric(name=name, description=description, rule=rule, summary=mean_score())


VQA = _vqa_metric("vqa", normalize_vqa, "VQA accuracy with the normalisation of VQA v2")
TEXTVQA = _vqa_metric("textvqa", normalize_m4c, "VQA accuracy with M4C's normalisation, as LLaVA scores TextVQA")
VIZWIZ = _vqa_metric("vizwiz", normalize_m4c, "VQA accuracy with M4C's normalisation, as lmms-eval scores VizWiz")
