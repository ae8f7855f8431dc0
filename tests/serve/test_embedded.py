"""The embedded engine's answers are those of `model.generate` for each question alone."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from engine_questions import Heard, ask, question
from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor, carried_model_path
from tokenpacker.scenes.fine_print import FinePrint
from tokenpacker.serve.embedded import EmbeddedEngine
from tokenpacker.serve.questions import Sampling


@pytest.fixture(scope="module")
def carried():
    folder = carried_model_path()
    model = TokenPackerForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return model, TokenPackerProcessor.from_pretrained(folder)


@pytest.fixture
def engine_of():
    """Makes engines that are closed after the test."""
    engines = []

    def make(model, processor, **limits):
        engines.append(EmbeddedEngine(model, processor, **limits))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close(0)


@pytest.fixture
def engine(engine_of, tiny_model, tiny_processor):
    return engine_of(tiny_model, tiny_processor)


def inputs_of(processor, asked):
    prompt = processor.apply_chat_template(list(asked.messages), add_generation_prompt=True, tokenize=False)
    options = {"scale_factor": asked.scale_factor, "max_image_tokens": asked.max_image_tokens}
    return processor([list(asked.images)], [prompt], return_tensors="pt", **options)


def offline(model, processor, asked):
    """The greedy answer and its number of tokens, by `generate`."""
    inputs = inputs_of(processor, asked)
    with torch.inference_mode():
        ids = model.generate(
            **inputs, do_sample=False, max_new_tokens=asked.sampling.max_tokens, pad_token_id=0, min_new_tokens=None
        )
    new = ids[0, inputs["input_ids"].shape[1] :].tolist()
    return processor.tokenizer.decode(new, skip_special_tokens=True).lstrip(), len(new)


def mixed(image_of, count):
    """Questions of different lengths, numbers of images, scale factors and budgets."""
    rng = random.Random(0)
    asked = []
    for seed in range(count):
        sides = [(rng.choice([20, 32, 64, 96]), rng.choice([20, 50, 90])) for _ in range(rng.choice([0, 1, 1, 2]))]
        images = [image_of(*size, seed=seed) for size in sides]
        options = rng.choice([{}, {"scale_factor": 1}, {"scale_factor": 4}, {"max_image_tokens": 40}])
        asked.append(question("what? " * rng.randint(1, 9), images, max_tokens=rng.randint(1, 12), **options))
    return asked


def test_answers_of_a_mixed_batch_are_those_of_generate_alone(engine_of, tiny_model, tiny_processor, image_of):
    engine = engine_of(tiny_model, tiny_processor, max_batch_size=5)
    questions = mixed(image_of, 40)
    heard = [ask(engine, asked) for asked in questions]
    for asked, one in zip(questions, heard, strict=True):
        assert (one.result()[0], one.counts[0]) == offline(tiny_model, tiny_processor, asked)
    assert max(engine.batch_sizes) == 5
    assert engine.tokens_generated == sum(one.counts[0] for one in heard)
    assert (engine.waiting, engine.running) == (0, 0)


def test_usage_counts_exactly_what_the_processor_lays_out(engine, tiny_processor, image_of):
    for asked in mixed(image_of, 20):
        ids = inputs_of(tiny_processor, asked)["input_ids"][0]
        usage = engine.prepare(asked).usage
        assert usage.prompt_tokens == len(ids)
        assert usage.image_tokens == sum(
            tiny_processor.image_layout(
                (image.height, image.width),
                scale_factor=asked.scale_factor,
                max_image_tokens=asked.max_image_tokens,
            ).num_tokens
            for image in asked.images
        )


def test_a_history_with_an_image_in_each_turn_is_read_in_order(engine, tiny_model, tiny_processor, image_of):
    image, text = {"type": "image"}, {"type": "text", "text": "and this?"}
    history = ({"role": "user", "content": [image, text]}, {"role": "assistant", "content": "a cat"})
    pictures = [image_of(64, 32, seed=1), image_of(32, 96, seed=2)]
    asked = question(images=pictures[1:], history=history)
    asked = type(asked)(messages=asked.messages, images=tuple(pictures), sampling=asked.sampling)
    assert ask(engine, asked).result()[0] == offline(tiny_model, tiny_processor, asked)[0]


def test_drawn_answers_do_not_depend_on_their_neighbours(engine, image_of):
    one = question(images=[image_of(40, 60)], temperature=1.0, top_p=0.9, seed=7, n=3, max_tokens=16)
    alone = ask(engine, one).result()
    assert len(set(alone)) == 3
    others = [question("w" * size, temperature=1.3, seed=size, max_tokens=20) for size in range(1, 12)]
    for asked in others[:6]:
        ask(engine, asked)
    beside = ask(engine, one)
    for asked in others[6:]:
        ask(engine, asked)
    assert beside.result() == alone
    assert max(engine.batch_sizes) > 3


def test_answers_without_a_seed_differ(engine):
    drawn = [ask(engine, question(temperature=1.0, max_tokens=16)) for _ in range(2)]
    assert drawn[0].result() != drawn[1].result()


def test_a_large_answer_count_is_answered_in_batches_that_fit(engine_of, tiny_model, tiny_processor):
    engine = engine_of(tiny_model, tiny_processor, max_batch_size=3)
    heard = ask(engine, question(n=8))
    assert len(set(heard.result())) == 1
    assert max(engine.batch_sizes) == 3


def test_a_batch_holds_no_more_tokens_than_allowed(engine_of, tiny_model, tiny_processor):
    prompt = len(inputs_of(tiny_processor, question())["input_ids"][0])
    engine = engine_of(tiny_model, tiny_processor, batch_tokens=3 * (prompt + 8) + 2)
    heard = [ask(engine, question()) for _ in range(9)]
    assert all(one.result() for one in heard)
    assert max(engine.batch_sizes) <= 3


def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(engine, image_of):
    asked = question(images=[image_of(40, 60)], temperature=1.0, seed=3, max_tokens=40)
    whole = ask(engine, asked).result()[0]
    stop = whole[10:13]
    heard = ask(engine, question(images=asked.images, temperature=1.0, seed=3, max_tokens=40, stop=(stop,)))
    assert heard.result()[0] == whole[: whole.index(stop)]
    assert heard.reasons == ["stop"]
    assert heard.counts[0] < 40


def test_the_end_token_ends_an_answer_and_is_counted(engine_of, make_tiny_model, tiny_processor):
    model = make_tiny_model()
    asked = question(max_tokens=6)
    inputs = inputs_of(tiny_processor, asked)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :].tolist()
    model.generation_config.eos_token_id = [ids[3]]
    heard = ask(engine_of(model, tiny_processor), asked)
    heard.result()
    assert (heard.reasons, heard.counts) == (["stop"], [ids.index(ids[3]) + 1])


def test_the_longest_answer_is_what_the_model_has_room_for(engine_of, tiny_model, tiny_processor):
    prompt = len(inputs_of(tiny_processor, question())["input_ids"][0])
    engine = engine_of(tiny_model, tiny_processor, batch_tokens=prompt + 5)
    heard = ask(engine, question(max_tokens=None))
    heard.result()
    assert (heard.counts, heard.reasons) == ([5], ["length"])
    with pytest.raises(ValueError, match=f"{prompt + 5} tokens but prompt and answer have room for {prompt + 5}"):
        engine.prepare(question("what is it?     "))
    assert engine.prepare(question("what is it?    ")).max_tokens == 1


@pytest.mark.parametrize("text", ["<image>", "see <image>\nthere", "</s>USER: ", "<s>", "<unk>"])
def test_a_token_of_the_models_own_in_a_text_is_refused(engine, text, image_of):
    for images in ([], [image_of(32, 32)]):
        with pytest.raises(ValueError, match="a token of the model's own; leave it out"):
            engine.prepare(question(text, images))


def test_a_token_of_the_models_own_is_refused_in_parts_too(engine):
    content = [{"type": "text", "text": "<"}, {"type": "text", "text": "/s>"}]
    with pytest.raises(ValueError, match="writes '</s>'"):
        engine.prepare(question(history=({"role": "user", "content": content},)))


def test_marks_of_regions_are_refused_by_a_model_with_regions(engine_of, region_model, image_of):
    engine = engine_of(*region_model)
    with pytest.raises(ValueError, match="'<mask>'"):
        engine.prepare(question("what is <mask>?", [image_of(32, 32)]))


def test_images_that_the_messages_do_not_place_are_refused(engine, image_of):
    asked = question(images=[image_of(32, 32)])
    for images in ((), asked.images * 2):
        with pytest.raises(ValueError, match=f"1 image parts but there are {len(images)} images"):
            engine.prepare(type(asked)(messages=asked.messages, images=images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale_factor": 0}, "scale_factor"),
        ({"max_image_tokens": 1}, "max_image_tokens"),
        ({"history": ({"role": "tool", "content": "x"},)}, "role 'tool'"),
        ({"history": ({"role": "user", "content": [{"type": "audio"}]},)}, "audio"),
        ({"history": ({"role": "user", "content": ["hello"]},)}, "part of a message is given as str"),
        ({"history": ({"role": "user", "content": "\ud800"},)}, "surrogate"),
    ],
)
def test_what_the_model_cannot_take_is_refused_before_it_is_queued(engine, image_of, change, message):
    with pytest.raises(ValueError, match=message):
        engine.prepare(question(images=[image_of(64, 64)], **change))


def test_an_image_that_was_seen_before_is_not_encoded_again(engine, image_of):
    asked = question(images=[image_of(64, 96)])
    first = ask(engine, asked).result()
    tiles = engine.cache.misses
    assert tiles > 1
    assert ask(engine, asked).result() == first
    assert (engine.cache.misses, engine.cache.hits) == (tiles, tiles)
    ask(engine, question(images=asked.images, scale_factor=4)).result()
    assert engine.cache.misses == 2 * tiles


def test_answers_are_the_same_without_a_cache(engine_of, tiny_model, tiny_processor, image_of):
    with_cache, without = (engine_of(tiny_model, tiny_processor, cache_bytes=size) for size in (2**20, 0))
    asked = question(images=[image_of(64, 96)])
    answers = [ask(engine, asked).result() for engine in (with_cache, with_cache, without, without)]
    assert answers == answers[:1] * 4
    assert (without.cache.hits, without.cache.bytes) == (0, 0)


def test_images_and_prompts_of_many_threads_of_the_model_give_the_answers_of_generate(
    engine_of, tiny_model, tiny_processor, image_of, monkeypatch
):
    questions = mixed(image_of, 24)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    engine = engine_of(tiny_model, tiny_processor, max_batch_size=12, cache_bytes=0)
    monkeypatch.undo()
    heard = [ask(engine, asked) for asked in questions]
    assert [one.result()[0] for one in heard] == [offline(tiny_model, tiny_processor, asked)[0] for asked in questions]
    assert engine._threads._pool is not None


def test_many_threads_ask_at_once(engine_of, tiny_model, tiny_processor, image_of):
    engine = engine_of(tiny_model, tiny_processor, max_waiting=1000)
    questions = mixed(image_of, 12)
    expected = [offline(tiny_model, tiny_processor, asked)[0] for asked in questions]
    with ThreadPoolExecutor(16) as pool:
        given = list(pool.map(lambda number: ask(engine, questions[number % 12]).result()[0], range(300)))
    assert given == expected * 25


def test_settings_of_the_model_that_are_not_applied_are_named(engine_of, make_tiny_model, tiny_processor):
    model = make_tiny_model()
    model.generation_config.repetition_penalty, model.generation_config.temperature = 1.3, 0.2
    with pytest.warns(UserWarning, match="sets repetition_penalty, which the embedded engine does not apply"):
        engine_of(model, tiny_processor)


def test_sampling_outside_of_its_range_is_refused():
    for name, value in (
        ("max_tokens", 0),
        ("temperature", -1),
        ("temperature", float("nan")),
        ("top_p", 1.1),
        ("n", 0),
    ):
        with pytest.raises(ValueError, match=f"{name}={value} is out of range; use"):
            Sampling(**{name: value})


def test_limits_below_one_are_refused(tiny_model, tiny_processor):
    for name in ("max_batch_size", "max_waiting", "max_new_tokens", "batch_tokens"):
        with pytest.raises(ValueError, match=f"{name}=0 is too small"):
            EmbeddedEngine(tiny_model, tiny_processor, **{name: 0})


def test_the_carried_model_answers_as_with_generate(engine_of, carried):
    samples = [FinePrint("test")[index] for index in range(8)]
    questions = [
        question(asked.text, [sample.image], scale_factor=(None, 1, 3, 4)[number % 4], max_tokens=24)
        for sample in samples
        for number, asked in enumerate(sample.questions[:3])
    ]
    questions.append(question("describe the image.", [samples[0].image], max_tokens=60))
    engine = engine_of(*carried)
    heard = [ask(engine, asked) for asked in questions]
    given = [(one.result()[0], one.counts[0]) for one in heard]
    assert given == [offline(*carried, asked) for asked in questions]
    right = sum(
        text == asked.answer
        for (text, _), asked in zip(given, (q for sample in samples for q in sample.questions[:3]), strict=False)
    )
    assert right >= 12
    assert {one.reasons[0] for one in heard} <= {"stop", "length"}


def test_pieces_arrive_while_the_answer_is_made(engine):
    heard = Heard()
    counts = []
    heard.on_piece = lambda piece: counts.append(piece.num_tokens)
    engine.submit(engine.prepare(question(max_tokens=12)), heard)
    heard.result()
    assert len(counts) > 3
    assert counts == sorted(counts)
