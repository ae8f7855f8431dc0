"""The language model split over two processes, as over two GPUs."""

from __future__ import annotations

from vllm_cases import Case, Transformers, answers, start

from tokenpacker.hf import carried_model_path


def test_two_processes_that_share_the_language_model_give_the_same_answers(image_of):
    theirs = Transformers(carried_model_path())
    cases = [
        Case("<s>USER: <image> what number is in the red box? ASSISTANT:", [image_of(200, 300)]),
        Case("<s>USER: <image> what is it? ASSISTANT:", [image_of(96, 190)], {"scale_factor": 3}),
    ]
    engine = start(carried_model_path(), tensor_parallel_size=2)
    assert answers(engine, cases) == [theirs.answer(case) for case in cases]
