"""The thresholds of a router, from what each tile loses."""

import copy

import pytest
import torch

from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor, carried_model_path
from tokenpacker.scenes import FinePrint
from tokenpacker.scenes.router_fit import TileLoss, fit, fit_router, tile_losses

FACTORS = (2, 4, 12)


def tile(detail: float, *increases: float, is_thumbnail: bool = False) -> TileLoss:
    return TileLoss(detail, is_thumbnail, (37, 10, 2), (0.0, *increases))


# The more detail, the more a tile loses; thumbnails lose nothing.
TILES = [tile(n / 100, 0.0 if n < 50 else 1.0, 0.0 if n < 20 else 2.0) for n in range(100)]
THUMBNAILS = [tile(n / 10, 0.0, 0.0, is_thumbnail=True) for n in range(1, 10)]


def test_without_a_loss_to_spend_only_tiles_that_lose_nothing_are_coarser():
    router = fit_router(100.0, TILES + THUMBNAILS, FACTORS, 0.0)
    coarse, coarsest = router.detail
    assert 0.45 < coarse <= 0.5
    assert 0.15 < coarsest <= 0.2
    assert router.thumbnail_detail[1] > 0.9  # all of them


def test_a_larger_bound_costs_fewer_tokens():
    costs = dict(zip(FACTORS, (37, 10, 2), strict=True))
    spent = []
    for bound in (0.0, 0.1, 0.3, 1.0, 9.0):
        router = fit_router(100.0, TILES, FACTORS, bound)
        chosen = [router.choose([one.detail], costs)[0] for one in TILES]
        lost = sum(one.increases[FACTORS.index(factor)] for one, factor in zip(TILES, chosen, strict=True))
        assert lost <= bound * 100
        spent.append(sum(costs[factor] for factor in chosen))
    assert spent == sorted(spent, reverse=True)
    assert (spent[0] > spent[2], spent[-1]) == (True, 200)


def test_a_tile_without_detail_gets_one_token_whatever_it_loses():
    flat = [tile(0.0, 0.1, 0.1) for _ in range(5)]
    assert min(fit_router(100.0, flat + TILES, FACTORS, 0.1).detail) > 0
    with pytest.raises(ValueError, match=r"bound=0.001 is below what tiles without detail lose; give a larger one"):
        fit_router(100.0, flat + TILES, FACTORS, 0.001)


def test_without_thumbnails_theirs_are_the_thresholds_of_all_tiles():
    router = fit_router(100.0, TILES, FACTORS, 0.1)
    assert router.thumbnail_detail == router.detail


@pytest.fixture(scope="module")
def carried():
    model = TokenPackerForConditionalGeneration.from_pretrained(carried_model_path()).eval()
    return model, TokenPackerProcessor.from_pretrained(carried_model_path())


def test_the_losses_of_a_tile_are_those_of_the_model_with_that_tile_alone_coarser(carried):
    model, processor = carried
    sample = next(FinePrint("train")[n] for n in range(20) if FinePrint("train")[n].image.width > 200)
    base, tiles = tile_losses(model, processor, sample, (4, 12))
    assert [one.is_thumbnail for one in tiles] == [False] * (len(tiles) - 1) + [True]

    def loss_of(factors) -> float:
        total = 0.0
        for question in sample.questions:
            content = [{"type": "image"}, {"type": "text", "text": question.text}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": question.answer}]
            texts = [processor.apply_chat_template(messages[:n], add_generation_prompt=n == 1) for n in (1, 2)]
            prompt, inputs = (
                processor([sample.image], [text], scale_factor=[factors], return_tensors="pt") for text in texts
            )
            labels = inputs["input_ids"].clone()
            labels[:, : prompt["input_ids"].shape[1]] = -100
            with torch.inference_mode():
                total += float(model(**inputs, labels=labels).loss)
        return total

    assert base == pytest.approx(loss_of([4] * len(tiles)), rel=1e-3)
    for place in (0, len(tiles) - 1):
        factors = [12 if number == place else 4 for number in range(len(tiles))]
        assert tiles[place].increases[1] == pytest.approx(loss_of(factors) - base, abs=2e-3)


def test_a_fitted_router_is_used_by_the_processor(carried):
    model, processor = carried[0], copy.copy(carried[1])
    samples = [FinePrint("train")[n] for n in range(3)]
    processor.router = fit(model, processor, samples, (4, 12), 0.3).to_dict()
    assert set(processor.plan_image(samples[0].image, scale_factor="auto").scale_factors) <= {4, 12}
