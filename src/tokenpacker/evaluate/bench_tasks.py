"""A task by name: a benchmark, a task of ours, or your own file, with its protocol, its metric and its questions."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tokenpacker.evaluate.bench_question import BenchQuestion, StoredImage
from tokenpacker.evaluate.layouts.loaded import Loaded, Problem
from tokenpacker.evaluate.metrics import Metric, find_metric
from tokenpacker.evaluate.own_task import load_own
from tokenpacker.evaluate.protocols import Protocol, benchmarks
from tokenpacker.evaluate.protocols import protocol as find_protocol
from tokenpacker.text import check_text, did_you_mean

if TYPE_CHECKING:
    from tokenpacker.evaluate.tasks import Task

HUB, OWN, OWN_SUFFIX = "hub", "own", ".jsonl"
IMAGE_MARK = "<image>"  # the token of an image in the models' prompts


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is asked and how it is scored.

    Args:
        name: of the benchmark or task; of an own file its name without the ending.
        data: folder of the benchmark's files, or the own file, both absolute; `hub`; None for a task of ours.
        is_scored: whether answers can be scored here; if not, a server does.
    """

    name: str
    protocol: Protocol
    metric: Metric
    loaded: Loaded
    data: str | None
    is_scored: bool


def kind_of(name: str) -> Literal["own", "benchmark", "ours"]:
    """What a task's name stands for: an own file, a benchmark, or a task of `TASKS`.

    Raises:
        ValueError: for an unknown name; the message lists the valid ones.
    """
    listed = [benchmark for benchmark in benchmarks() if benchmark != OWN]
    if name.endswith(OWN_SUFFIX):
        return "own"
    if name in listed:
        return "benchmark"
    from tokenpacker.evaluate.tasks import TASKS

    if name in TASKS:
        return "ours"
    known = [*TASKS, *listed]
    raise ValueError(
        f"task {name!r} is unknown; use a file that ends in {OWN_SUFFIX}, or some of: {', '.join(known)}"
        f"{did_you_mean(name, known)}"
    )


def find_bench(
    name: str,
    *,
    data: Path | str | None = None,
    protocol: str | None = None,
    metric: str | None = None,
    split: str | None = None,
) -> Bench:
    """The task of that name, with all questions. Those that cannot be asked have the reason in `extra["problem"]`.

    Args:
        name: of `protocols.benchmarks()`, of `TASKS`, or the path of an own file that ends in `.jsonl`.
        data: folder of a benchmark's files, or `hub`; for an own file also its path.
        protocol: None takes the first of the benchmark's.
        metric: of an own file; None takes the protocol's. Other tasks have one metric.
        split: of a benchmark; None takes the protocol's.

    Raises:
        ValueError: for an unknown task, protocol or metric, for options that the task does not take, for data that are
            missing, and if none of the questions can be asked.
        ModuleNotFoundError: if a library is missing that the data or the metric need.
    """
    own = next((Path(path) for path in (data or "", name) if str(path).endswith(OWN_SUFFIX)), None)
    if own is not None:
        if split:
            raise ValueError(f"split={split!r} was given for {own}, which has no splits; leave it out")
        loaded = load_own(own)
        chosen = find_protocol(OWN, protocol or ("letter" if any(each.options for each in loaded.questions) else None))
        return _checked(own.stem, chosen, find_metric(metric or chosen.metric), loaded, str(own.resolve()))
    if kind_of(name) == "benchmark":
        chosen = find_protocol(name, protocol)
        _refuse_metric(name, metric, chosen.metric)
        if data is None:
            raise ValueError(f"task {name} needs its files; give --data DIR, or --data hub to take them from the hub")
        from tokenpacker.evaluate.layouts import load_benchmark

        place: Path | Literal["hub"] = "hub" if data == HUB else Path(data).expanduser().resolve()
        found = find_metric(chosen.metric)
        loaded = load_benchmark(name, place, split=split or None)
        return _checked(name, chosen, found, loaded, str(place))
    from tokenpacker.evaluate import tasks

    for option, value, other in (("data", data, None), ("protocol", protocol, "plain"), ("split", split, "")):
        if value not in (None, other):
            raise ValueError(f"{option}={str(value)!r} was given for task {name}, which has none; leave it out")
    chosen = _plain_protocol(tasks.TASKS[name])
    _refuse_metric(name, metric, chosen.metric)
    loaded = Loaded(questions=tuple(_questions(tasks.TASKS[name])), source=tasks.TASKS[name].description)
    return _checked(name, chosen, find_metric(chosen.metric), loaded, None)


def draw(count: int, limit: int | None, seed: int) -> Sequence[int]:
    """Indices of `limit` of `count` questions, drawn at random and sorted; all of them without a limit.

    Raises ValueError when the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1; leave it out to ask every question")
    whole = range(count)
    return whole if limit is None or limit >= count else sorted(random.Random(seed).sample(whole, limit))


def _refuse_metric(name: str, metric: str | None, own: str) -> None:
    if metric not in (None, own):
        raise ValueError(f"metric={metric!r} was given for task {name}, which is scored by {own}; leave it out")


def _plain_protocol(task: Task) -> Protocol:
    return Protocol(
        benchmark=task.name,
        name="plain",
        metric="exact",
        template="{question}",
        max_new_tokens=task.max_new_tokens,
        sources={"all": "tokenpacker.evaluate.tasks"},
    )


def _questions(task: Task) -> Iterator[BenchQuestion]:
    for sample in task.load():
        for place, question in enumerate(sample.questions):
            regions = {"regions": [sample.regions[index] for index in question.regions]} if question.regions else {}
            yield BenchQuestion(
                id=f"{sample.name} {place}",
                text=question.text,
                images=(sample.image,),
                answers=(question.answer,),
                extra={"category": question.kind, **regions},
            )


def _checked(name: str, protocol: Protocol, metric: Metric, loaded: Loaded, data: str | None) -> Bench:
    """The task, once questions that have no prompt or no score are marked."""
    if protocol.temperature or protocol.num_beams != 1:
        raise ValueError(f"protocol {protocol.name!r} of {name} is not greedy, which `evaluate` always is; use another")
    is_scored = not metric.scored_elsewhere and any(question.answers for question in loaded.questions)
    problems, kept = list(loaded.problems), []
    for question in loaded.questions:
        if protocol.benchmark == "refcoco":
            question = _with_box(question)
        if not question.is_broken:
            try:
                prompt = check_text(protocol.prompt(question), f"the prompt of question {question.id!r}")
                if IMAGE_MARK in prompt:
                    raise ValueError(f"{IMAGE_MARK} stands in its text, but images stand before it; take it out")
                if is_scored:
                    metric.check(question)
            except ValueError as error:
                problems.append(Problem("malformed row", question.id, str(error)))
                question = replace(question, extra={**question.extra, "problem": str(error)})
        kept.append(question)
    if all(question.is_broken for question in kept):
        reason = f", such as {problems[0].where}: {problems[0].text}" if problems else ""
        raise ValueError(f"none of the {len(kept):,} questions of {name} can be asked{reason}")
    loaded = replace(loaded, questions=tuple(kept), problems=tuple(problems))
    return Bench(name=name, protocol=protocol, metric=metric, loaded=loaded, data=data, is_scored=is_scored)


def _with_box(question: BenchQuestion) -> BenchQuestion:
    """A question of RefCOCO with its box drawn on the image, as lmms-eval does."""
    box = question.extra.get("box")
    if box is None or not question.images:
        return question
    key = f"{question.image_key}\nbox {' '.join(map(str, box))}"
    drawn = StoredImage(key, partial(_draw_box, replace(question, images=question.images[:1]), tuple(box)))
    return replace(question, images=(drawn,))


def _draw_box(question: BenchQuestion, box: tuple[float, float, float, float]) -> bytes:
    from PIL import ImageDraw

    (picture,) = question.open_images()
    size = picture.width, picture.height
    ImageDraw.Draw(picture).rectangle([share * size[index % 2] for index, share in enumerate(box)], outline="red")
    file = io.BytesIO()
    picture.save(file, "BMP")  # quick, and nothing is lost
    return file.getvalue()
