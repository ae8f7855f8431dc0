"""POPE and MME: questions answered with yes or no."""

from tokenpacker.evaluate.protocols.protocol import (
    LLAVA_DOCS,
    LLAVA_LOADER,
    LLAVA_SCRIPTS,
    MME_ENDING,
    SHORT,
    Protocol,
)

_PAPER = {"prompt": LLAVA_DOCS, "decoding": LLAVA_SCRIPTS, "max_new_tokens": LLAVA_LOADER}

PROTOCOLS = (
    Protocol(
        benchmark="pope",
        name="paper",
        metric="pope",
        template="{question}" + SHORT,
        max_new_tokens=128,
        from_file=True,
        split="COCO: random, popular, adversarial",
        note="the published number is the mean F1 of the three splits; lmms-eval's is of all questions together, and"
        " takes any answer but yes and no as wrong",
        sources={**_PAPER, "metric": "LLaVA llava/eval/eval_pope.py"},
    ),
    Protocol(
        benchmark="pope",
        name="lmms-eval",
        metric="pope",
        template="{question}" + SHORT,
        max_new_tokens=128,
        split="COCO: random, popular, adversarial",
        sources={"all": "lmms-eval 0.7.3 tasks/pope"},
    ),
    Protocol(
        benchmark="mme",
        name="paper",
        metric="mme",
        template="{question}" + SHORT,
        drop=MME_ENDING,
        max_new_tokens=128,
        from_file=True,
        split="perception and cognition",
        note="the data set's own ending, `Please answer yes or no.`, is replaced; with it the score differs",
        sources={**_PAPER, "metric": "MME's eval_tool/calculation.py"},
    ),
    Protocol(
        benchmark="mme",
        name="lmms-eval",
        metric="mme",
        template="{question}" + SHORT,
        drop=MME_ENDING,
        max_new_tokens=16,
        split="perception and cognition",
        sources={"all": "lmms-eval 0.7.3 tasks/mme"},
    ),
)
