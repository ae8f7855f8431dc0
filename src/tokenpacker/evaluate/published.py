"""Published results of the paper and of what it compares with, to stand beside measured ones.

Source: TokenPacker (arXiv 2407.02392) unless a row names another. All with Vicuna-1.5 and CLIP-L/14-336.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tokenpacker.released import RELEASED_MODELS

PAPER = "arXiv 2407.02392, projectors compared on LLaVA-1.5's data (558K + 665K), 7B"
ABLATION = "arXiv 2407.02392, ablation, 7B"
DENSE_CONNECTOR = "Dense Connector, a later paper, 7B; a secondary copy"


@dataclass(frozen=True)
class Published:
    """A published result.

    Args:
        benchmark: name as in `tokenpacker.evaluate.protocols`.
        number: the named number of the benchmark's metric that it is compared with.
        model: projector or model.
        tokens: image tokens, the mean for HD models.
        score: in the number's unit, percent for shares.
        source: where it stands.
    """

    benchmark: str
    number: str
    model: str
    tokens: int
    score: float
    source: str


# benchmark -> the number that papers report
HEADLINES = {
    "mmbench": "accuracy",
    "mm-vet": "score",
    "vqav2": "accuracy",
    "gqa": "accuracy",
    "pope": "f1",
    "vizwiz": "accuracy",
    "textvqa": "accuracy",
    "docvqa": "anls",
    "ocrbench": "score",
    "mmmu": "accuracy",
    "mme": "perception",
}
# name in `tokenpacker.released` -> benchmark
_RELEASED = {
    "MMB": "mmbench",
    "MM-Vet": "mm-vet",
    "VQAv2": "vqav2",
    "GQA": "gqa",
    "POPE": "pope",
    "VizWiz": "vizwiz",
    "TextVQA": "textvqa",
    "DocVQA": "docvqa",
    "OCRB": "ocrbench",
    "MMMU": "mmmu",
    "MME": "mme",
}
_IN_PAPER = "TokenPacker-7b-144token"  # whose scores stand among the projectors
_COLUMNS = ("mmbench", "mm-vet", "vqav2", "gqa", "pope", "vizwiz")
_PROJECTORS = (
    ("mlp", 576, 64.3, 31.1, 78.5, 62.0, 85.9, 50.0),
    ("average-pool", 144, 64.3, 26.7, 76.4, 60.3, 86.4, 51.3),
    ("average-pool", 64, 62.4, 27.1, 72.6, 58.8, 85.4, 48.0),
    ("resampler", 144, 63.1, 29.2, 75.1, 58.4, 84.7, 51.9),
    ("resampler", 64, 63.4, 29.2, 74.1, 57.7, 83.4, 53.0),
    ("c-abstractor", 144, 63.1, 29.4, 74.6, 59.2, 84.6, 49.2),
    ("c-abstractor", 64, 62.5, 29.0, 74.4, 59.3, 85.0, 45.6),
    ("pixel-shuffle", 144, 64.0, 29.7, 76.2, 60.1, 85.9, 48.8),
    ("pixel-shuffle", 64, 63.2, 28.5, 74.6, 59.1, 85.2, 47.4),
    ("ldp-v2", 144, 66.2, 28.7, 77.3, 61.1, 86.1, 47.6),
    ("ldp-v2", 64, 63.7, 30.0, 75.3, 59.7, 85.5, 49.3),
    ("token-packer", 144, 65.1, 33.0, 77.9, 61.8, 87.0, 52.0),
    ("token-packer", 64, 64.1, 31.7, 77.2, 61.1, 86.3, 50.7),
)
_HD_TOKENS = 954  # mean
_ABLATION = (
    ("average pooling as query", 144, 76.4, 60.3, 55.3),
    ("average pooling as query, injection", 144, 77.5, 61.6, 56.5),
    ("learnable query, injection", 144, 76.1, 59.8, 55.2),
    ("average pooling as query, injection, multi-level", 144, 77.9, 61.9, 57.2),
    ("TokenPacker-HD", _HD_TOKENS, 79.9, 63.2, 64.0),
)


def _published() -> Iterator[Published]:
    for model, tokens, *scores in _PROJECTORS:
        for benchmark, score in zip(_COLUMNS, scores, strict=True):
            yield Published(benchmark, HEADLINES[benchmark], model, tokens, score, PAPER)
    for benchmark, score in {"mmbench": 67.6, "mm-vet": 34.4, "vqav2": 79.4, "gqa": 62.8}.items():
        yield Published(benchmark, HEADLINES[benchmark], "dense-connector", 144, score, DENSE_CONNECTOR)
    for model, tokens, *scores in _ABLATION:
        for benchmark, score in zip(("vqav2", "gqa", "textvqa"), scores, strict=True):
            yield Published(benchmark, HEADLINES[benchmark], model, tokens, score, ABLATION)
    for released in RELEASED_MODELS:
        for shown, given in released.scores if released.name != _IN_PAPER else ():
            benchmark, source = _RELEASED[shown], released.scores_from or ""
            numbers = ("perception", "cognition") if benchmark == "mme" else (HEADLINES[benchmark],)
            for number, score in zip(numbers, given if isinstance(given, tuple) else (given,), strict=True):
                yield Published(benchmark, number, released.name, released.mean_tokens or 0, score, source)


PUBLISHED = tuple(_published())


def published(benchmark: str) -> tuple[Published, ...]:
    """The published results of a benchmark, most tokens first; none if there are none."""
    rows = [row for row in PUBLISHED if row.benchmark == benchmark]
    return tuple(sorted(rows, key=lambda row: -row.tokens))
