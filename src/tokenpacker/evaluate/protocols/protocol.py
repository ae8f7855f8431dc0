"""A protocol: the prompt, the decoding and the metric of a benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter, ascii_uppercase

from tokenpacker.evaluate.bench_question import BenchQuestion

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
MME_ENDING = " Please answer yes or no."

# What values come from.
LLAVA_DOCS = "LLaVA docs/Evaluation.md"
LLAVA_SCRIPTS = "LLaVA scripts/v1_5/eval (--temperature 0, one beam)"
LLAVA_LOADER = "LLaVA llava/eval/model_vqa_loader.py (max_new_tokens)"
TOKENPACKER_DOCVQA = "TokenPacker llava/eval/eval_docvqa.py"
TOKENPACKER_OCRBENCH = "TokenPacker llava/eval/eval_ocr_bench.py"
LMMS_DEFAULT = "lmms-eval 0.7.3, whose task gives no limit: models/simple/llava.py takes 1,024"

_FIELDS = ("question", "sentence", "options", "bracketed", "hint", "spaced_hint", "context", "ocr", "reference")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a benchmark is asked and scored.

    Args:
        benchmark: its name.
        name: `paper` for LLaVA-1.5's, which the paper follows; `lmms-eval` for lmms-eval's default; or another.
        metric: name of a metric of `tokenpacker.evaluate.metrics`.
        template: the prompt, with these fields in braces: `question` as in the data set; `sentence`, the question in
            lower case with a capital first letter; `options` as lines `A. text`; `bracketed` as lines `(A) text`;
            `hint` with a line break, `spaced_hint` with a space, and `context` as `Context: hint` with a line break,
            all empty without a hint; `ocr`, words joined by a comma; `reference`, the first reference.
        open_template: the prompt of a question without options; None takes `template`.
        max_new_tokens: limit of an answer.
        temperature: 0 takes the most likely token always.
        num_beams: 1 is no beam search.
        from_file: whether a question from LLaVA's own question file keeps the prompt that stands there.
        drop: text that is taken out of the question.
        split: the split of the published numbers, and who scores it.
        sources: where each value comes from.
        note: what else moves the score.

    Raises:
        ValueError: for a template with an unknown field.
    """

    benchmark: str
    name: str
    metric: str
    template: str
    max_new_tokens: int
    sources: Mapping[str, str]
    open_template: str | None = None
    temperature: float = 0.0
    num_beams: int = 1
    from_file: bool = False
    drop: str = ""
    split: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        for template in (self.template, self.open_template or ""):
            if unknown := {name for _, name, _, _ in Formatter().parse(template) if name} - set(_FIELDS):
                raise ValueError(f"template has the fields {sorted(unknown)}; use some of: {', '.join(_FIELDS)}")

    def prompt(self, question: BenchQuestion) -> str:
        """The text of the user's turn, without the image.

        Raises:
            ValueError: if the question lacks what the template needs: options, or words read in the image.
        """
        given = question.extra.get("prompt")
        if self.from_file and given is not None:
            return str(given)
        template = self.template if question.options or self.open_template is None else self.open_template
        needs = {"options": question.options, "bracketed": question.options, "reference": question.answers}
        for _, name, _, _ in Formatter().parse(template):
            if (name == "ocr" and question.extra.get("ocr") is None) or (name in needs and not needs[name]):
                raise ValueError(
                    f"question {question.id!r} has no {name}, which protocol {self.name!r} of {self.benchmark} needs;"
                    " use a data set that has it, or another protocol"
                )
        text = question.text.strip().replace(self.drop, "") if self.drop else question.text.strip()
        hint = str(question.extra.get("hint") or "")
        lettered = list(zip(ascii_uppercase, question.options, strict=False))
        return template.format(
            question=text,
            sentence=text.capitalize(),
            options="\n".join(f"{letter}. {option}" for letter, option in lettered),
            bracketed="".join(f"({letter}) {option}\n" for letter, option in lettered),
            hint=f"{hint}\n" if hint else "",
            spaced_hint=f"{hint} " if hint else "",
            context=f"Context: {hint}\n" if hint else "",
            ocr=", ".join(question.extra.get("ocr") or ()),
            reference=question.answers[0] if question.answers else "",
        )
