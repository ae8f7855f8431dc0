"""The parts of the embedded engine: drawing tokens, packed tokens of tiles, and the cache of rows."""

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache

from tokenpacker.serve.embedded.asked_questions import Asked
from tokenpacker.serve.embedded.model_threads import ModelThreads
from tokenpacker.serve.embedded.packed_cache import PackedCache, tile_key, tile_parts
from tokenpacker.serve.embedded.prepared_prompts import Prompt
from tokenpacker.serve.embedded.row_cache import SPARE_COLUMNS, RowCache
from tokenpacker.serve.embedded.row_sampling import RowSampler, choose_tokens
from tokenpacker.serve.questions import Piece, Sampling, Usage


def sampler(index=0, **sampling):
    return RowSampler(Sampling(**sampling), index)


def test_a_temperature_of_zero_takes_the_most_likely_token():
    logits = torch.randn(5, 30)
    for temperature in (0, 1e-61):  # the latter is 0 in float32
        chosen = choose_tokens(logits, [sampler(temperature=temperature) for _ in range(5)])
        assert chosen == logits.argmax(dim=-1).tolist()


def test_tokens_are_drawn_as_often_as_temperature_and_top_p_say():
    logits = torch.tensor([1.0, 2.0, 3.0, -1.0]).log_softmax(dim=0)
    hot = sampler(temperature=2.0, seed=1)
    counts = torch.bincount(torch.tensor([hot.draw(logits) for _ in range(4000)]), minlength=4) / 4000
    # four standard deviations of a share of 4,000 draws
    torch.testing.assert_close(counts, (logits / 2).softmax(dim=0), atol=4 * (0.25 / 4000) ** 0.5, rtol=0)
    two = sampler(top_p=0.8, seed=1)  # the probabilities are 0.66, 0.24, 0.09 and 0.01
    assert {two.draw(logits) for _ in range(300)} == {1, 2}
    assert {sampler(top_p=0.0, seed=seed).draw(logits) for seed in range(20)} == {2}


def test_rows_draw_as_if_they_were_alone():
    logits = torch.randn(4, 50)
    settings = [{"temperature": 0}, {"seed": 5}, {"seed": 5, "index": 1}, {"temperature": 0.5, "seed": -9}]
    alone = [choose_tokens(logits[row : row + 1], [sampler(**each)])[0] for row, each in enumerate(settings)]
    assert choose_tokens(logits, [sampler(**each) for each in settings]) == alone


def test_a_row_with_a_nan_or_without_a_finite_maximum_gets_no_token():
    logits = torch.zeros(5, 3)
    logits[1, 2], logits[2, 0], logits[3], logits[4, 0] = torch.nan, torch.inf, -torch.inf, -torch.inf
    tokens = choose_tokens(logits, [sampler(seed=1) for _ in range(5)])
    assert [token is None for token in tokens] == [False, True, True, True, False]


def test_a_listener_is_told_nothing_after_the_end(tiny_tokenizer):
    prompt = Prompt(ids=[1], tiles=None, keys=[], sampling=Sampling(), max_tokens=1, usage=Usage(1, 0))
    for end in (Asked.cancel, lambda asked: asked.tell(MemoryError())):
        heard, ended = [], []
        asked = Asked(prompt, tiny_tokenizer, heard.append, ended.append)
        end(asked)
        told = list(heard)
        asked.tell(Piece(0, "late", 2))
        assert (heard, ended) == (told, [asked])


def test_the_cache_of_packed_tokens_drops_what_was_not_used_for_longest():
    tokens = torch.ones(2, 3)
    cache = PackedCache(2 * tokens.nbytes)
    keys = [tile_key(torch.full((3, 2, 2), float(value)), 2) for value in range(3)]
    cache.put(keys[0], tokens)
    cache.put(keys[1], tokens)
    assert cache.get(keys[0]) is not None
    cache.put(keys[2], tokens)
    assert [cache.get(key) is not None for key in keys] == [True, False, True]
    assert (cache.bytes, cache.hits, cache.misses) == (2 * tokens.nbytes, 3, 1)


def test_tokens_of_the_cache_stay_what_they_were_whatever_their_sizes_and_uses():
    """Against a plain dict; what is used often stays, and no more is held than allowed."""
    draw, cache, known = random.Random(0), PackedCache(400 * 4), {}
    often = (b"often", 2)
    for number in range(3_000):
        key = (bytes([draw.randrange(60)]), draw.choice((2, 3, None)))
        known.setdefault(key, torch.full((draw.randrange(1, 12), 4), float(number)))
        known.setdefault(often, torch.full((5, 4), -1.0))
        for asked in (key, often):
            found = cache.get(asked)
            if found is None:
                cache.put(asked, known[asked])
            else:
                assert torch.equal(found, known[asked])
        assert cache.bytes <= 400 * 4
    assert cache.misses > 500
    assert cache.hits > 3_000 - 2
    assert cache.bytes > 0.6 * 400 * 4  # tiles that were used again leave gaps


def test_tokens_that_were_given_out_are_not_written_over():
    cache = PackedCache(4 * 12 * 4)
    cache.put((b"first", 2), torch.ones(4, 4))
    given = cache.get((b"first", 2))
    for number in range(12):
        cache.put((bytes([number]), 2), torch.zeros(4, 4))
    assert torch.equal(given, torch.ones(4, 4))


def test_parts_are_shared_among_threads_that_compute_alone(tiny_model):
    before = torch.get_num_threads()
    with ThreadPoolExecutor(1) as owner:
        threads = owner.submit(ModelThreads, tiny_model, 3).result()
        for num_parts, each in ((2, 3), (3, 1), (8, 1)):
            seen = threads.map(lambda part: (part, torch.get_num_threads()), range(num_parts))
            assert owner.submit(list, seen).result() == [(part, each) for part in range(num_parts)]
            assert owner.submit(torch.get_num_threads).result() == 3
        threads.close()
    assert torch.get_num_threads() == before


def test_the_first_error_of_several_threads_is_raised_once_all_have_ended(tiny_model):
    ended = []

    def call(part):
        if part == 1:
            raise MemoryError("no memory left")
        time.sleep(0.05)
        ended.append(part)

    with ThreadPoolExecutor(1) as owner:
        threads = owner.submit(ModelThreads, tiny_model, 2).result()
        with pytest.raises(MemoryError):
            owner.submit(lambda: list(threads.map(call, range(4)))).result()
        threads.close()
    assert sorted(ended) == [0, 2, 3]


@pytest.mark.parametrize(("num_tiles", "sizes"), [(0, []), (1, [1]), (15, [15]), (16, [8, 8]), (70, [12] * 5 + [10])])
def test_tiles_are_divided_evenly_if_there_are_enough_for_all_threads(num_tiles, sizes):
    keys = [(bytes([number]), None) for number in range(num_tiles)]
    parts = tile_parts(keys, 2)
    assert [len(part) for part in parts] == sizes
    assert [key for part in parts for key in part] == keys
    assert tile_parts(keys, 1) == ([keys] if keys else [])


def test_what_is_larger_than_the_cache_is_not_kept():
    cache = PackedCache(10)
    cache.put((b"", None), torch.ones(2, 3))
    assert cache.get((b"", None)) is None
    assert cache.bytes == 0


def test_a_tile_is_known_by_its_pixels_and_its_scale_factor():
    tile = torch.rand(3, 4, 4)
    changed = tile.clone()
    changed[2, 3, 3] += 1e-6
    assert tile_key(tile, 2) == tile_key(tile.clone(), 2) != tile_key(tile, 4)
    assert tile_key(changed, 2) != tile_key(tile, 2)


def test_packed_tokens_from_the_cache_are_those_of_the_model(tiny_model, tiny_processor, image_of):
    inputs = [
        tiny_processor(image_of(64, 96, seed=seed), scale_factor=factor) for seed, factor in ((0, 1), (0, 2), (1, 4))
    ]
    cache = PackedCache(10**9)
    for _ in range(2):
        for given in inputs:
            pixels, factors = torch.as_tensor(given["pixel_values"]), given["scale_factors"]
            tiles = {tile_key(tile, int(factor)): tile for tile, factor in zip(pixels, factors, strict=True)}
            with torch.inference_mode():
                expected = tiny_model.get_image_features(pixels, scale_factors=factors).pooler_output
                packed = cache.pack(tiny_model, tiles, ModelThreads(tiny_model, 2))
            for tokens, each in zip(packed.values(), expected, strict=True):
                torch.testing.assert_close(tokens, each)
    assert cache.hits == cache.misses == len(cache._places)


@pytest.mark.parametrize("seed", range(4))
def test_rows_keep_their_keys_and_values_while_others_come_and_go(seed):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    cache, rows = RowCache(2), []  # rows: keys of the first layer, (H, S, D) each
    for _ in range(300):
        if not rows or rng.random() < 0.2:
            count, length = rng.randint(1, 3), rng.randint(1, 120)
            new = DynamicCache()
            states = torch.rand(count, 2, length, 3, generator=generator) + 1
            for layer in range(2):
                new.update(states + layer, states * 10 + layer, layer)
            cache.add(new)
            rows += list(states)
        elif rng.random() < 0.4:
            place = rng.randrange(len(rows))
            width = max(row.shape[1] for row in rows)
            rows[place] = rows[-1]
            rows.pop()
            cache.drop(place, width - max((row.shape[1] for row in rows), default=0))
        else:
            states = torch.rand(len(rows), 2, 1, 3, generator=generator) + 1
            for layer in range(2):
                keys, values = cache.update(states + layer, states * 10 + layer, layer)
            assert keys.shape == values.shape == (len(rows), 2, cache.get_seq_length(), 3)
            rows = [torch.cat([row, new], dim=1) for row, new in zip(rows, states, strict=True)]
        for layer in range(2):
            kept = cache.layers[layer]
            assert kept.keys.shape[2] == max((row.shape[1] for row in rows), default=0)
            for place, row in enumerate(rows):
                padding = kept.keys.shape[2] - row.shape[1]
                assert torch.equal(kept.keys[place, :, padding:], row + layer)
                assert torch.equal(kept.values[place, :, padding:], row * 10 + layer)
                assert not kept.keys[place, :, :padding].any()
                assert not kept.values[place, :, :padding].any()


def test_a_step_does_not_copy_the_cache():
    cache, new = RowCache(1), DynamicCache()
    new.update(torch.ones(2, 1, 5, 3), torch.ones(2, 1, 5, 3), 0)
    cache.add(new)
    first = cache.layers[0].keys.data_ptr()
    for _ in range(SPARE_COLUMNS):
        cache.update(torch.ones(2, 1, 1, 3), torch.ones(2, 1, 1, 3), 0)
    assert cache.layers[0].keys.data_ptr() == first


def test_rows_that_find_the_cache_empty_take_the_memory_of_those_before():
    cache, pointers = RowCache(1), set()
    for length in (9, 5, 9):
        new = DynamicCache()
        new.update(torch.ones(2, 1, length, 3), torch.ones(2, 1, length, 3), 0)
        cache.add(new)
        cache.update(torch.ones(2, 1, 1, 3), torch.ones(2, 1, 1, 3), 0)
        pointers.add(cache.layers[0].keys.untyped_storage().data_ptr())
        cache.drop(0, 0)
        cache.drop(0, length + 1)
    assert len(pointers) == 1
