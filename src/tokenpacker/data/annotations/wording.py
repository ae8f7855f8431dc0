"""The questions of each task, in several wordings of which a sample's seed draws one.

The wordings are this package's own. `{region}` stands for the region's mark.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from tokenpacker.hf.processing.llama_tokenizer import REGION_TOKEN


def _asking(form: str, *questions: str) -> tuple[str, ...]:
    """Wordings of one question, each followed by the form of the answer."""
    return tuple(f"{question} {form}" for question in questions)


NAME = _asking(
    "Answer with the name of the category alone.",
    "What is {region}?",
    "Name {region}.",
    "What kind of thing is {region}?",
    "Which category does {region} belong to?",
    "What do you see at {region}?",
    "Tell me what {region} is.",
)

PART = _asking(
    "Answer as object: part.",
    "Which part of which object is {region}?",
    "What does {region} belong to, and which part of it is it?",
    "Name the object and the part that {region} covers.",
    "{region} is a part of something. What is it, and of what?",
    "Say which object {region} lies on, and which part of it.",
)

_REFER = (
    "Describe {region} so that nobody would take another thing in the picture for it.",
    "How would you point out {region} to someone in words?",
    "Give a phrase that fits {region} and nothing else here.",
    "With which words would I find {region} in this picture?",
    "Refer to {region} in a few words that leave no doubt.",
)
REFER = _asking("Its place may be part of the answer.", *_REFER)
REFER_BY_LOOKS = _asking("Say what it looks like, not where it is.", *_REFER)

PHRASE = _asking(
    "Answer with a short phrase.",
    "Describe {region} briefly.",
    "What is going on at {region}?",
    "Say in a few words what {region} shows.",
    "What would a short caption of {region} say?",
    "Sum up {region} in a phrase.",
    "Put {region} into a few words.",
)

DETAIL = (
    "Describe {region} in detail.",
    "What can you say about {region}? Leave nothing out.",
    "Give a full account of {region}.",
    "Look closely at {region} and tell me everything you notice.",
    "Write a thorough description of {region}.",
    "I cannot see the picture. What is {region} like, exactly?",
)

WHY = (
    "Why do you think so?",
    "What makes you say that?",
    "How can you tell?",
    "What in the picture speaks for it?",
    "Give your reasons.",
    "Explain your answer.",
)

SHORT_FORM = "Answer with a single word or a short phrase."

LISTED = (
    "Marked in the picture: {regions}.",
    "Look at {regions}.",
    "I have marked {regions} in the picture.",
    "This is about {regions}.",
)


def ask(wordings: Sequence[str], chance: random.Random) -> str:
    """A question about one region."""
    return chance.choice(wordings).format(region=REGION_TOKEN)


def list_regions(count: int, chance: random.Random) -> str:
    """A sentence that introduces regions 1 to `count`, each with its mark."""
    named = [f"region {number} {REGION_TOKEN}" for number in range(1, count + 1)]
    listed = named[0] if count == 1 else f"{', '.join(named[:-1])} and {named[-1]}"
    return chance.choice(LISTED).format(regions=listed)
