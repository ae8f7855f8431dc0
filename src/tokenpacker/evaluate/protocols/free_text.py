"""MM-Vet, RefCOCO, and a user's own questions."""

from tokenpacker.evaluate.protocols.protocol import LETTER, LLAVA_DOCS, LLAVA_SCRIPTS, LMMS_DEFAULT, SHORT, Protocol

_OWN = {"prompt": LLAVA_DOCS, "decoding": LLAVA_SCRIPTS}

PROTOCOLS = (
    Protocol(
        benchmark="mm-vet",
        name="paper",
        metric="mm-vet",
        template="{question}",
        max_new_tokens=1024,
        from_file=True,
        split="218 questions, scored by GPT-4",
        note="the judge's version moves the score",
        sources={
            "prompt": LLAVA_DOCS,
            "max_new_tokens": "LLaVA llava/eval/model_vqa.py",
            "decoding": LLAVA_SCRIPTS,
        },
    ),
    Protocol(
        benchmark="mm-vet",
        name="lmms-eval",
        metric="mm-vet",
        template="First please perform reasoning, and think step by step to provide best answer to the following"
        " question: \n\n{question}",
        max_new_tokens=1024,
        split="218 questions, scored by GPT",
        note="the task says temperature 0.2, but does not sample: the answers are greedy",
        sources={"all": "lmms-eval 0.7.3 tasks/mmvet"},
    ),
    Protocol(
        benchmark="refcoco",
        name="lmms-eval",
        metric="refcoco",
        template="Provide a short description for this region.",
        max_new_tokens=1024,
        split="val, testA, testB",
        note="lmms-eval draws the region's box on the image in red; it splits words with a Java program",
        sources={"all": "lmms-eval 0.7.3 tasks/refcoco", "max_new_tokens": LMMS_DEFAULT},
    ),
    Protocol(
        benchmark="refcoco-boxes",
        name="lmms-eval",
        metric="iou",
        template="Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x,"
        " bottom-right y). All values are floating point numbers bounded between 0 and 1. Please provide the bounding"
        " box coordinate of the region this sentence describes: {question}",
        max_new_tokens=1024,
        split="val, testA, testB",
        sources={"all": "lmms-eval 0.7.3 tasks/refcoco, bbox_rec", "max_new_tokens": LMMS_DEFAULT},
    ),
    Protocol(
        benchmark="own",
        name="plain",
        metric="exact",
        template="{hint}{question}",
        max_new_tokens=128,
        sources={"prompt": "the question as it is", "decoding": LLAVA_SCRIPTS},
    ),
    Protocol(
        benchmark="own",
        name="short",
        metric="exact",
        template="{hint}{question}" + SHORT,
        max_new_tokens=128,
        sources=_OWN,
    ),
    Protocol(
        benchmark="own",
        name="letter",
        metric="exact",
        template="{hint}{question}\n{options}" + LETTER,
        max_new_tokens=128,
        sources=_OWN,
    ),
)
