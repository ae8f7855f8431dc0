"""lmms-eval runs the carried model. `make test-lmms` runs the tests, in an environment with lmms-eval."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image

from lmms_tasks import few_signs, lmms_eval, write_tasks
from same_questions import evaluated, same_questions
from tokenpacker.evaluate import Task, evaluate
from tokenpacker.hf import carried_model_path

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; run `make test-lmms`")

TINY = f"pretrained={carried_model_path()}"
GREEDY = {"max_new_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def signs():
    return few_signs()


@pytest.fixture(scope="module")
def tasks(signs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder, signs)
    return folder


@pytest.fixture(scope="module")
def run(tasks, tmp_path_factory):
    """What the command line wrote about all questions at scale factor 2."""
    return lmms_eval(tasks, tmp_path_factory.mktemp("run"), *options_of("signs"))


@pytest.fixture(scope="module")
def chat():
    from tokenpacker.plugins.lmms_eval_model import TokenPackerChat

    return TokenPackerChat(pretrained="tiny", batch_size=1)


@pytest.fixture(scope="module")
def simple():
    from tokenpacker.plugins.lmms_eval_model import TokenPackerSimple

    return TokenPackerSimple(pretrained="tiny", batch_size=3)


def options_of(task: str) -> list[str]:
    return ["--tasks", task, "--model_args", f"{TINY},scale_factor=2", "--batch_size", "8"]


def answers(run: dict) -> list[str]:
    return [sample["filtered_resps"] for sample in run["samples"]]


def requests(model, kind: str, arguments: list[tuple]) -> list:
    """Requests as lmms-eval makes them, each with a document of its own."""
    from lmms_eval.api.instance import Instance

    model.task_dict = {"made": {"test": list(range(len(arguments)))}}
    metadata = {"task": "made", "repeats": 1}
    return [
        Instance(kind, (*given, number, "made", "test"), 0, metadata | {"doc_id": number})
        for number, given in enumerate(arguments)
    ]


def generate(model, contents: list[list], **settings) -> list:
    """Answers to messages that are given as lists of texts and pictures."""
    asked = []
    for content in contents:
        parts = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "url": part}
            for part in content
        ]
        messages = [{"role": "user", "content": parts}]
        asked.append(("", lambda doc, messages=messages: messages, {**GREEDY, **settings}))
    return model.generate_until(requests(model, "generate_until", asked))


def questions(signs) -> list[list]:
    """Pictures of several sizes, two in one question, and none."""
    asked = [[sample.image, sample.questions[0].text] for sample in signs]
    return [*asked, [signs[0].image, signs[1].image, signs[1].questions[0].text], ["what number is it?"]]


def test_the_command_line_gives_the_answers_and_the_score_of_our_own_evaluation(run, chat, signs):
    task = Task(name="signs", description="", load=lambda: signs)
    ours = evaluate(chat.model, chat.processor, task, scale_factor=2, progress=False)
    assert run["results"]["signs"]["right,none"] == pytest.approx(ours.accuracy)
    wrong = {(error.question, error.answer) for error in ours.errors}
    asked = [question.text for sample in signs for question in sample.questions]
    theirs = list(zip(asked, answers(run), strict=True))
    missed = {pair for pair, it in zip(theirs, run["samples"], strict=True) if not it["right"]}
    assert len(theirs) == ours.score.num_questions > len(wrong)
    assert missed == wrong


@pytest.mark.slow
def test_200_questions_get_the_answers_and_the_score_that_evaluate_gives(chat, tmp_path, monkeypatch):
    samples = same_questions()
    _, ours, accuracy = evaluated(samples, tmp_path / "ours", chat.model, chat.processor, monkeypatch)
    write_tasks(tmp_path, samples)
    theirs = lmms_eval(tmp_path, tmp_path / "theirs", "--tasks", "signs", "--model_args", TINY, "--batch_size", "8")
    assert answers(theirs) == ours
    assert 100 * theirs["results"]["signs"]["right,none"] == pytest.approx(accuracy)


@pytest.mark.slow
def test_two_processes_give_the_answers_of_one(run, tasks, tmp_path):
    assert len(run["samples"]) % 2  # one process gets a question more
    two = lmms_eval(tasks, tmp_path, *options_of("signs"), processes=2)
    assert answers(two) == answers(run)
    assert two["results"]["signs"]["right,none"] == run["results"]["signs"]["right,none"]


@pytest.mark.slow
def test_the_command_line_chooses_by_likelihood(tasks, tmp_path):
    result = lmms_eval(tasks, tmp_path, *options_of("signs_choice"), "--force_simple")
    for sample in result["samples"]:
        losses = [loss for loss, _ in sample["filtered_resps"]]
        assert len(losses) == 3
        assert sample["acc"] == float(("yes", "no", "zebra")[losses.index(min(losses))] == sample["target"])
        assert losses[2] > min(losses)


def test_a_batch_gives_the_answers_of_single_questions(chat, signs, monkeypatch):
    single = [generate(chat, [content])[0] for content in questions(signs)]
    monkeypatch.setattr(chat, "batch_size", 4)
    assert generate(chat, questions(signs)) == single
    assert len({answer.text for answer in single}) > 1


def test_both_classes_ask_alike(chat, simple, signs):
    asked = [(sample.questions[0].text, GREEDY, lambda doc: [signs[doc].image]) for sample in signs]
    assert simple.generate_until(requests(simple, "generate_until", asked)) == generate(
        chat, [[sample.image, sample.questions[0].text] for sample in signs]
    )


def test_a_question_about_several_images_has_the_tokens_of_all(chat, signs):
    pictures = [sample.image for sample in signs[:2]]
    (answer,), (without,) = generate(chat, [[*pictures, "what?"]]), generate(chat, [["what?"]])
    sizes = [(picture.height, picture.width) for picture in pictures]
    tokens = sum(chat.processor.image_layout(size).num_tokens for size in sizes)
    lines = len(chat.processor.tokenizer("\n" * len(pictures), add_special_tokens=False).input_ids)  # after each
    assert answer.token_counts.input_tokens == without.token_counts.input_tokens + tokens + lines


def test_a_text_may_say_where_its_images_stand(chat, signs):
    one, two = signs[0].image, signs[1].image
    assert generate(chat, [[one, two, "<image>\n<image>\nwhat?"]]) == generate(chat, [[one, two, "what?"]])
    with pytest.raises(ValueError, match="markers"):
        generate(chat, [[one, "<image><image> what?"]])


@pytest.mark.parametrize("options", [{"scale_factor": 4}, {"max_image_tokens": 60}])
def test_scale_factor_and_budget_change_the_number_of_tokens(chat, signs, monkeypatch, options):
    picture = signs[0].image
    (whole,) = generate(chat, [[picture, "what?"]])
    monkeypatch.setattr(chat, "image_options", options)
    (fewer,) = generate(chat, [[picture, "what?"]])
    size = (picture.height, picture.width)
    saved = chat.processor.image_layout(size).num_tokens - chat.processor.image_layout(size, **options).num_tokens
    assert whole.token_counts.input_tokens - fewer.token_counts.input_tokens == saved > 0


def test_an_answer_ends_before_a_stop_text(chat, signs):
    ((whole,), (cut,)) = (generate(chat, [questions(signs)[0]], until=until) for until in (["\n\n"], None))
    assert whole == cut
    stop = whole.text[-1]
    (cut,) = generate(chat, [questions(signs)[0]], until=[stop, ""])
    assert cut.text == whole.text[: whole.text.index(stop)]


def test_generation_stops_at_a_stop_text(chat):
    from tokenpacker.plugins.lmms_eval_model import StopTexts

    tokenizer = chat.processor.tokenizer
    prompt, answer = (tokenizer(text, add_special_tokens=False).input_ids for text in ("one two", "three four"))
    rows = torch.tensor([prompt + answer, answer + prompt])
    assert StopTexts(tokenizer, ["four"], len(prompt))(rows, None).tolist() == [True, False]
    assert StopTexts(tokenizer, ["one"], len(prompt))(rows, None).tolist() == [False, len(prompt) == len(answer)]


def test_losses_are_those_of_a_loop_over_single_tokens(simple, signs):
    sample = signs[0]
    choices = [sample.questions[0].answer, "yes", "a zebra and more"]
    asked = [(sample.questions[0].text, f" {choice}", lambda doc: [sample.image]) for choice in choices]
    results = simple.loglikelihood(requests(simple, "loglikelihood", asked))
    processor, model = simple.processor, simple.model
    content = [{"type": "image"}, {"type": "text", "text": sample.questions[0].text}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    for choice, result in zip(choices, results, strict=True):
        loss, is_greedy = result.text
        inputs = processor(sample.image, prompt, return_tensors="pt")
        whole = processor(sample.image, f"{prompt} {choice}{processor.tokenizer.eos_token}", return_tensors="pt")
        length, logs, greedy = inputs["input_ids"].shape[1], [], []
        for place in range(length, whole["input_ids"].shape[1]):
            ids = whole["input_ids"][:, :place]
            with torch.no_grad():
                logits = model(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    pixel_values=inputs["pixel_values"],
                    scale_factors=inputs["scale_factors"],
                ).logits[0, -1]
            token = whole["input_ids"][0, place]
            logs.append(logits.log_softmax(dim=0)[token].item())
            greedy.append(logits.argmax() == token)
        assert loss == pytest.approx(-math.fsum(logs) / len(logs), abs=1e-4)  # float32, another order of sums
        assert is_greedy == all(greedy)
    assert results[2].text[0] > results[0].text[0]


def test_an_answer_alone_has_a_loss_too(simple):
    from lmms_eval.api.instance import Instance

    request = Instance("loglikelihood", ("", "yes"), 0, {"task": "made", "doc_id": 0, "repeats": 1})
    (result,) = simple.loglikelihood([request])
    assert result.text[0] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale_facter": 2}, "has no option 'scale_facter'.*scale_factor"),
        ({"max_batch_size": 4}, "has no option 'max_batch_size'"),
        ({"batch_size": "auto"}, "batch_size=auto"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"scale_factor": 0}, "scale_factor=0"),
        ({"max_image_tokens": 1}, "max_image_tokens=1"),
        ({"pretrained": ""}, "needs a model"),
    ],
)
def test_a_wrong_option_is_refused_before_the_weights_are_read(options, message, monkeypatch):
    from tokenpacker.plugins import lmms_eval_model

    monkeypatch.delattr(lmms_eval_model, "TokenPackerForConditionalGeneration")
    with pytest.raises(ValueError, match=message):
        lmms_eval_model.TokenPackerChat(**{"pretrained": "tiny"} | options)


def test_what_is_not_supported_is_refused(chat):
    with pytest.raises(ValueError, match="no option 'max_new_token'"):
        generate(chat, [["what?"]], max_new_token=3)
    video = [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]
    with pytest.raises(ValueError, match="images and text"):
        chat.generate_until(requests(chat, "generate_until", [("", lambda doc: video, GREEDY)]))
    with pytest.raises(NotImplementedError, match="one round"):
        chat.generate_until_multi_round([])


@pytest.mark.parametrize(
    ("settings", "samples"),
    [
        ({}, False),
        ({"temperature": 0, "do_sample": True, "top_p": 0.9}, False),
        ({"temperature": 0.7, "do_sample": False}, False),
        ({"temperature": 0.7}, True),
        ({"do_sample": True}, True),
    ],
)
def test_an_answer_is_drawn_only_at_a_temperature_above_0(settings, samples):
    from tokenpacker.plugins.lmms_eval_model import generation_options

    options, _ = generation_options(settings)
    assert options["do_sample"] is samples
    assert samples or options["temperature"] is options["top_p"] is None


def test_a_picture_in_any_mode_is_read(chat):
    (answer,) = generate(chat, [[Image.new("RGBA", (40, 30), (255, 0, 0, 128)), "what?"]])
    assert answer.token_counts.input_tokens > 0
