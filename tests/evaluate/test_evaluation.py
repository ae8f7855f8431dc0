"""Asking a model all questions of a task: the fast way gives the answers of the plain way."""

import copy
from dataclasses import replace

import pytest
import torch

from tokenpacker.evaluate import Task, evaluate
from tokenpacker.evaluate.asker import Asker
from tokenpacker.evaluate.evaluation import draw_questions
from tokenpacker.hf import add_regions
from tokenpacker.scenes import Question, Sample

QUESTIONS = ("what is it?", "how many words are there?", "is the word cat there?", "which?")


@pytest.fixture(scope="module")
def samples(image_of):
    """Images of one, three and seven tiles, each with questions of different lengths."""
    return [
        Sample(
            name=f"image-{height}x{width}",
            image=image_of(height, width, seed=height),
            questions=tuple(Question(text, "yes", text.split()[0]) for text in QUESTIONS[: 2 + index % 3]),
            caption="",
        )
        for index, (height, width) in enumerate([(32, 32), (30, 33), (32, 64), (64, 32), (64, 96), (33, 31)])
    ]


@pytest.fixture(scope="module")
def task(samples):
    return Task(name="toy", description="noise", load=lambda: samples, max_new_tokens=5)


def plain_answer(model, processor, sample, question, **plan) -> str:
    """The answer as any transformers user would get it: one image, one question, one call of `generate`."""
    content = [{"type": "image"}, {"type": "text", "text": question.text}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs = processor(images=sample.image, text=prompt, return_tensors="pt", **plan)
    output = model.generate(**inputs, scale_factor=plan.get("scale_factor"), max_new_tokens=5, do_sample=False)
    return processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize(("batch_size", "scale_factor"), [(1, None), (5, None), (100, 4)])
def test_answers_equal_those_of_one_generate_per_question(
    talkative_model, tiny_processor, samples, batch_size, scale_factor
):
    every_question = [(sample, question) for sample in samples for question in sample.questions]
    plain = [
        plain_answer(talkative_model, tiny_processor, sample, question, scale_factor=scale_factor)
        for sample, question in every_question
    ]
    assert len(set(plain)) > len(plain) / 2  # or this test would prove nothing
    truthful = iter(plain)
    told = [
        Sample(
            name=sample.name,
            image=sample.image,
            questions=tuple(Question(question.text, next(truthful), question.kind) for question in sample.questions),
            caption="",
        )
        for sample in samples
    ]
    task = Task(name="toy", description="the model's own answers", load=lambda: told, max_new_tokens=5)
    result = evaluate(
        talkative_model, tiny_processor, task, scale_factor=scale_factor, batch_size=batch_size, progress=False
    )
    assert [(error.question, error.answer, error.truth) for error in result.errors] == []
    assert result.score.num_questions == len(plain)


def test_tokens_are_the_mean_of_what_the_processor_used(tiny_model, tiny_processor, samples, task):
    result = evaluate(tiny_model, tiny_processor, task, progress=False)
    used = [tiny_processor.image_layout((s.image.height, s.image.width)).num_tokens for s in samples]
    assert result.image_tokens == pytest.approx(sum(used) / len(used))
    assert result.num_images == len(samples)


def test_a_budget_bounds_every_image(tiny_model, tiny_processor, samples):
    asker = Asker(tiny_model, tiny_processor, max_image_tokens=60)
    assert all(asker.layout(sample.image).num_tokens <= 60 for sample in samples)


def test_kinds_add_up_to_the_whole(tiny_model, tiny_processor, task):
    result = evaluate(tiny_model, tiny_processor, task, progress=False)
    assert set(result.kinds) == {"what", "how", "is", "which?"}
    assert sum(score.num_questions for score in result.kinds.values()) == result.score.num_questions


def test_a_limit_draws_questions_at_random_by_seed(samples):
    def drawn(limit, seed=0):
        return [(s.name, q.text) for s in draw_questions(samples, limit, seed) for q in s.questions]

    everything = drawn(None)
    assert drawn(7) == drawn(7)
    assert len(drawn(7)) == 7
    assert set(drawn(7)) <= set(everything)
    assert drawn(7) != drawn(7, seed=1)
    assert drawn(7) != everything[:7]
    assert drawn(10_000) == everything
    assert all(sample.questions for sample in draw_questions(samples, 2, seed=0))


def test_a_limit_below_one_is_refused(samples):
    with pytest.raises(ValueError, match="limit=0 must be at least 1"):
        draw_questions(samples, 0, seed=0)


def test_a_scale_factor_that_cannot_be_is_refused(tiny_model, tiny_processor, task):
    with pytest.raises(ValueError, match="scale_factor=99"):
        evaluate(tiny_model, tiny_processor, task, scale_factor=99, progress=False)


def test_nothing_is_printed_without_progress_and_nothing_to_standard_output_with_it(
    tiny_model, tiny_processor, task, capsys
):
    evaluate(tiny_model, tiny_processor, task, limit=2, progress=False)
    assert capsys.readouterr() == ("", "")
    evaluate(tiny_model, tiny_processor, task, limit=2, progress=True)
    assert capsys.readouterr().out == ""


def test_questions_about_masks_are_refused_by_a_model_that_takes_none(tiny_model, tiny_processor):
    with pytest.raises(ValueError, match="task 'regions' asks about masks, which this model cannot take"):
        evaluate(tiny_model, tiny_processor, "regions", progress=False)


@pytest.fixture(scope="module")
def region_model(talkative_model, tiny_processor):
    """The talkative model with a region module, and its processor."""
    model, processor = copy.deepcopy(talkative_model), copy.deepcopy(tiny_processor)
    add_regions(model, processor)
    with torch.no_grad():
        for layer in model.model.region_encoder.parameters():
            layer.normal_(std=0.5)
    return model, processor


@pytest.fixture(scope="module")
def marked_samples(samples):
    """The images, each with three regions and questions about one or two of them."""
    asked = [("what is <mask>?", (2,)), ("is <mask> left of <mask>?", (1, 0)), ("where?", ()), ("why <mask>?", (0,))]
    regions = ((0, 0, 12, 9), (10, 3, 30, 28), (20, 20, 28, 29))
    questions = tuple(Question(text, "yes", "any", places) for text, places in asked)
    kept = [questions[: 1 + index % 4] for index in range(len(samples))]
    return [replace(sample, questions=some, regions=regions) for sample, some in zip(samples, kept, strict=True)]


@pytest.mark.parametrize("batch_size", [1, 100])
def test_answers_about_masks_equal_those_of_one_generate_per_question(region_model, marked_samples, batch_size):
    model, processor = region_model
    told = []
    for sample in marked_samples:
        answers = [plain_region_answer(model, processor, sample, question) for question in sample.questions]
        pairs = zip(sample.questions, answers, strict=True)
        told.append(replace(sample, questions=tuple(replace(question, answer=answer) for question, answer in pairs)))
    answers = [question.answer for sample in told for question in sample.questions]
    assert len(set(answers)) > len(answers) / 2  # or this test would prove nothing
    task = Task(name="toy", description="the model's own", load=lambda: told, max_new_tokens=5, regions=True)
    result = evaluate(model, processor, task, batch_size=batch_size, progress=False)
    assert [(error.question, error.answer, error.truth) for error in result.errors] == []


def test_other_masks_change_answers(region_model, marked_samples):
    """Or the test before would not see masks that went to other questions."""
    model, processor = region_model
    answers = [
        {
            plain_region_answer(model, processor, sample, replace(sample.questions[0], regions=(place,)))
            for place in range(3)
        }
        for sample in marked_samples
    ]
    assert sum(len(different) > 1 for different in answers) >= 3


def plain_region_answer(model, processor, sample, question) -> str:
    """The answer as a user would get it, with the masks of the one question."""
    content = [{"type": "image"}, {"type": "text", "text": question.text}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    masks = [[sample.regions[place] for place in question.regions]]
    inputs = processor(images=[sample.image], text=prompt, region_masks=masks, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    return processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
