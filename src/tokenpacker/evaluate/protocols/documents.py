"""DocVQA, ChartQA, OCRBench: text in images. LLaVA-1.5 has none of them; the paper's scripts have two."""

from tokenpacker.evaluate.protocols.protocol import (
    LLAVA_DOCS,
    LLAVA_LOADER,
    LLAVA_SCRIPTS,
    SHORT,
    TOKENPACKER_DOCVQA,
    TOKENPACKER_OCRBENCH,
    Protocol,
)

PROTOCOLS = (
    Protocol(
        benchmark="docvqa",
        name="paper",
        metric="anls",
        template="{question}" + SHORT,
        max_new_tokens=128,
        split="test, scored by the server",
        note="a final period is taken off before answers are submitted; the original's script shows an HD model the"
        " first tile of a page alone (docs/evaluation.md)",
        sources={
            "prompt": TOKENPACKER_DOCVQA,
            "max_new_tokens": TOKENPACKER_DOCVQA,
            "decoding": "TokenPacker scripts/v1_5/eval/docvqa.sh",
            "metric": "https://rrc.cvc.uab.es/?ch=17",
        },
    ),
    Protocol(
        benchmark="docvqa",
        name="lmms-eval",
        metric="anls",
        template="{question}" + SHORT,
        max_new_tokens=32,
        split="val",
        sources={"all": "lmms-eval 0.7.3 tasks/docvqa"},
    ),
    Protocol(
        benchmark="chartqa",
        name="paper",
        metric="relaxed",
        template="{question}" + SHORT,
        max_new_tokens=128,
        split="test, human and augmented",
        note="neither LLaVA-1.5 nor the paper's code has ChartQA: this is LLaVA's prompt for short answers",
        sources={
            "prompt": LLAVA_DOCS,
            "decoding": LLAVA_SCRIPTS,
            "max_new_tokens": LLAVA_LOADER,
            "metric": "ChartQA (arXiv 2203.10244), section 5.1",
        },
    ),
    Protocol(
        benchmark="chartqa",
        name="lmms-eval",
        metric="relaxed",
        template="{question}\nAnswer the question with a single word.",
        max_new_tokens=16,
        split="test, human and augmented",
        sources={"all": "lmms-eval 0.7.3 tasks/chartqa"},
    ),
    Protocol(
        benchmark="ocrbench",
        name="paper",
        metric="ocrbench",
        template="{question}" + SHORT,
        max_new_tokens=128,
        split="1,000 questions",
        note="the instruction shortens answers; earlier revisions of the script cut every image into up to 16 tiles",
        sources={
            "prompt": TOKENPACKER_OCRBENCH,
            "max_new_tokens": TOKENPACKER_OCRBENCH,
            "decoding": TOKENPACKER_OCRBENCH,
            "metric": "https://github.com/Yuliang-Liu/MultimodalOCR",
        },
    ),
    Protocol(
        benchmark="ocrbench",
        name="lmms-eval",
        metric="ocrbench",
        template="{question}",
        max_new_tokens=128,
        split="1,000 questions",
        note="no instruction follows the question, as in OCRBench's own scripts",
        sources={"all": "lmms-eval 0.7.3 tasks/ocrbench"},
    ),
)
