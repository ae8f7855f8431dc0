"""MMMU: options by letter or text, open answers by number or text, by subject.

Follows the official evaluation (https://github.com/MMMU-Benchmark/MMMU), except that an answer without any option is
wrong, where the official code draws an option at random.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.metrics.metric import Metric, mean_score

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LONG_ANSWER = 5  # words, from which the text of an option is looked for
ANNOUNCED = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
SENTENCE_END = re.compile(r"\.\s(?=[A-Z])|\n")
NUMBERS = (  # each is looked for by itself, so that `1,234` is also 234
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,234
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1.2e3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),  # 12, 1.2
)


def chosen_option(answer: str, options: Sequence[str]) -> str:
    """The letter of the option that an answer names last; empty if it names none."""
    text = answer
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    letters = LETTERS[: len(options)]
    for form in ("({})", "{} ", "{}."):
        if named := [letter for letter in letters if form.format(letter) in text]:
            place = "({})" if form == "({})" else " {} "
            return max(named, key=lambda letter: (text.rfind(place.format(letter)), -letters.index(letter)))
    if len(text.split()) <= LONG_ANSWER:
        return ""
    lower = text.lower()
    places = {letter: lower.rfind(option.lower()) for letter, option in zip(letters, options, strict=False)}
    named = [letter for letter in places if places[letter] >= 0]
    return max(named, key=lambda letter: (places[letter], -letters.index(letter)), default="")


def comparable(text: str) -> list[str | float]:
    """A number rounded to 2 digits, or the text in lower case; one character with a space before or after it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except (ValueError, OverflowError):
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def stated(answer: str) -> list[str | float]:
    """What an open answer states: the ends of its sentences after words such as `is`, and the numbers in them."""
    sentences = SENTENCE_END.split(answer.strip().strip(".").lower())
    ends = []
    for place, sentence in enumerate(sentences):
        words = ANNOUNCED + (("=",) if place == len(sentences) - 1 else ())
        tails = [tail for word in words if word in sentence and (tail := sentence.split(word)[-1].strip())]
        if tails and (shortest := min(tails, key=len)) not in set(":,.!?;'"):
            ends.append(shortest)
    ends = ends or [answer.strip().strip(".").lower()]
    found = ends + [number for end in ends for form in NUMBERS for number in form.findall(end)]
    return [value for text in found for value in comparable(text)]


def mmmu_rule(answer: str, question: BenchQuestion) -> float:
    """1 for the right option, or an open answer that states a reference."""
    if question.options:
        return float(chosen_option(answer, question.options) in question.answers)
    wanted = [value for reference in question.answers for value in comparable(reference)]
    texts = [value for value in wanted if isinstance(value, str)]
    return float(
        any(
            any(text in value for text in texts) if isinstance(value, str) else value in wanted
            for value in stated(answer)
        )
    )


MMMU = Metric(
    name="mmmu",
    description="share of right options and open answers, by subject; an answer that names no option is wrong",
    rule=mmmu_rule,
    summary=mean_score(),
)
