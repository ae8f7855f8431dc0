"""One model in many threads: each call gets the features of its own images."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

THREADS, CALLS = 8, 500


@pytest.fixture(scope="module")
def requests(tiny_processor, image_of):
    """Inputs of different images with different numbers of tiles, and of different scale factors."""
    sizes = [(32, 32), (64, 64), (32, 96), (96, 64), (90, 40), (64, 32), (96, 96)]
    prompts = [
        tiny_processor(image_of(*size, seed=seed), "USER: <image>\nwhat? ASSISTANT:", return_tensors="pt")
        for seed, size in enumerate(sizes)
    ]
    assert len({len(inputs["pixel_values"]) for inputs in prompts}) >= 4
    return prompts


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_features_and_answers_of_eight_threads_are_those_of_lone_calls(make_tiny_model, requests, vision):
    model = make_tiny_model(vision=vision)

    def features(inputs, scale_factor):
        return model.get_image_features(inputs["pixel_values"], scale_factor=scale_factor).pooler_output

    def answer(inputs, _):
        return model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)

    calls = [
        (answer if number % 5 == 0 else features, number % len(requests), (1, 2, 4)[number % 3])
        for number in range(CALLS)
    ]
    with torch.no_grad():
        alone = {call: call[0](requests[call[1]], call[2]) for call in set(calls)}

    def run(call):
        with torch.no_grad():
            return call, call[0](requests[call[1]], call[2])

    with ThreadPoolExecutor(THREADS) as pool:
        wrong = [call for call, result in pool.map(run, calls) if not torch.equal(result, alone[call])]
    assert wrong == []
