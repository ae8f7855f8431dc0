"""Protocols of the benchmarks: prompt, decoding and metric by name, with the source of every value.

>>> from tokenpacker.evaluate.bench_question import BenchQuestion
>>> from tokenpacker.evaluate.protocols import protocol, protocol_names
>>> protocol_names("textvqa")
['paper', 'no-ocr', 'lmms-eval']
>>> question = BenchQuestion(id="1", text="what does the sign say?", extra={"ocr": ["STOP", "ALL", "WAY"]})
>>> print(protocol("textvqa").prompt(question))
What does the sign say?
Reference OCR token: STOP, ALL, WAY
Answer the question using a single word or phrase.
>>> print(protocol("textvqa", "no-ocr").prompt(question))
What does the sign say?
Answer the question using a single word or phrase.
"""

from tokenpacker.evaluate.protocols import documents, free_text, multiple_choice, short_answers, yes_no_questions
from tokenpacker.evaluate.protocols.protocol import Protocol
from tokenpacker.text import did_you_mean

__all__ = ["PROTOCOLS", "Protocol", "benchmarks", "protocol", "protocol_names"]

PROTOCOLS = {
    (listed.benchmark, listed.name): listed
    for family in (short_answers, documents, yes_no_questions, multiple_choice, free_text)
    for listed in family.PROTOCOLS
}


def benchmarks() -> list[str]:
    """Names of all benchmarks."""
    return list(dict.fromkeys(benchmark for benchmark, _ in PROTOCOLS))


def protocol_names(benchmark: str) -> list[str]:
    """Names of a benchmark's protocols, the default first.

    Raises:
        ValueError: for an unknown benchmark; the message lists the valid ones.
    """
    if benchmark not in benchmarks():
        raise ValueError(f"benchmark {benchmark!r} is unknown; use one of: {', '.join(benchmarks())}")
    return [name for other, name in PROTOCOLS if other == benchmark]


def protocol(benchmark: str, name: str | None = None) -> Protocol:
    """A benchmark's protocol; without a name the default, `paper` where there is one.

    Raises:
        ValueError: for an unknown benchmark or protocol; the message lists the valid ones.
    """
    names = protocol_names(benchmark)
    if name is not None and name not in names:
        whose = "questions of your own" if benchmark == "own" else benchmark
        valid = f"{', '.join(names)}{did_you_mean(name, names)}"
        raise ValueError(f"protocol {name!r} of {whose} is unknown; use one of: {valid}")
    return PROTOCOLS[benchmark, name or names[0]]
