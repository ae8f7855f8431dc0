"""MMBench, SEED-Bench, ScienceQA, MMMU: an option's letter as the answer."""

from tokenpacker.evaluate.protocols.protocol import (
    LETTER,
    LLAVA_DOCS,
    LLAVA_LOADER,
    LLAVA_SCRIPTS,
    LMMS_DEFAULT,
    SHORT,
    Protocol,
)

_MMBENCH_SCRIPT = "LLaVA llava/eval/model_vqa_mmbench.py"
_SCIENCEQA_SCRIPT = "LLaVA llava/eval/model_vqa_science.py"
_MMMU_CODE = "MMMU's construct_prompt and configs/llava1.5.yaml, which TokenPacker llava/eval/mmmu uses"

PROTOCOLS = (
    Protocol(
        benchmark="mmbench",
        name="paper",
        metric="mmbench",
        template="{hint}{question}\n{options}" + LETTER,
        max_new_tokens=1024,
        split="dev 20230712, scored by the server with GPT",
        note="the server asks GPT what an answer without a letter means; here it is wrong",
        sources={"prompt": _MMBENCH_SCRIPT, "max_new_tokens": _MMBENCH_SCRIPT, "decoding": LLAVA_SCRIPTS},
    ),
    Protocol(
        benchmark="mmbench",
        name="lmms-eval",
        metric="mmbench",
        template="{spaced_hint}{question} There are several options:\n{options}\n" + LETTER,
        max_new_tokens=1024,
        split="dev",
        sources={"all": "lmms-eval 0.7.3 tasks/mmbench, English"},
    ),
    Protocol(
        benchmark="seed",
        name="paper",
        metric="seed",
        template="{question}\n{options}" + LETTER,
        max_new_tokens=128,
        from_file=True,
        split="images and frames of videos",
        note="LLaVA-1.5's headline is of images and videos; scores of images only are higher",
        sources={"prompt": LLAVA_DOCS, "decoding": LLAVA_SCRIPTS, "max_new_tokens": LLAVA_LOADER},
    ),
    Protocol(
        benchmark="seed",
        name="lmms-eval",
        metric="seed",
        template="{question}\n{options}" + LETTER,
        max_new_tokens=1024,
        split="images and videos",
        note="lmms-eval takes the first character of an answer as the letter, also of `About three`",
        sources={"all": "lmms-eval 0.7.3 tasks/seedbench", "max_new_tokens": LMMS_DEFAULT},
    ),
    Protocol(
        benchmark="scienceqa",
        name="paper",
        metric="scienceqa",
        template="{context}{question}\n{options}" + LETTER,
        max_new_tokens=1024,
        from_file=True,
        split="test; IMG for those with an image",
        sources={
            "prompt": "LLaVA scripts/v1_5/eval/sqa.sh (llava_test_CQM-A.json, --single-pred-prompt); the form of the"
            " context is lmms-eval's",
            "max_new_tokens": _SCIENCEQA_SCRIPT,
            "decoding": LLAVA_SCRIPTS,
            "metric": "LLaVA llava/eval/eval_science_qa.py",
        },
    ),
    Protocol(
        benchmark="scienceqa",
        name="lmms-eval",
        metric="scienceqa",
        template="{context}{question}\n{options}" + LETTER,
        max_new_tokens=16,
        split="test",
        sources={"all": "lmms-eval 0.7.3 tasks/scienceqa"},
    ),
    Protocol(
        benchmark="mmmu",
        name="paper",
        metric="mmmu",
        template="{question}\n\n{bracketed}\n" + LETTER,
        open_template="{question}\n" + SHORT,
        max_new_tokens=1024,
        split="validation",
        note="the original code asks no question with several images and guesses the answer; here they are asked. It"
        " draws an option at random where the answer names none; here that is wrong",
        sources={"prompt": _MMMU_CODE, "max_new_tokens": "TokenPacker llava/eval/mmmu/eval/utils/model_utils_ind.py"},
    ),
    Protocol(
        benchmark="mmmu",
        name="lmms-eval",
        metric="mmmu",
        template="{question}\n{options}\n" + LETTER,
        open_template="{question}\n" + SHORT,
        max_new_tokens=128,
        split="validation",
        note="lmms-eval draws an option at random where the answer names none; here that is wrong",
        sources={"all": "lmms-eval 0.7.3 tasks/mmmu"},
    ),
)
