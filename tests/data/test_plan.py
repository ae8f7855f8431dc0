from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenpacker.data import plan
from tokenpacker.data.plan import Planner, fill

MAX_LENGTH = 100

# Of eight samples with 10 to 80 tokens, as first planned.
PACKED = [[[7, 1], [6, 2]], [[4, 0], [5, 3]]]
GROUPED = [[[7], [6]], [[1], [0]], [[4], [3]], [[5], [2]]]


def lengths_of(pairs):
    """Columns of (tokens, tiles) per sample."""
    tokens, tiles = zip(*pairs, strict=True) if pairs else ((), ())
    return SimpleNamespace(tokens=np.array(tokens, dtype=np.int32), tiles=np.array(tiles, dtype=np.int32))


def mixed_lengths(count, seed=0):
    """A fifth text alone, the others with one to five tiles of 9 tokens."""
    random = np.random.default_rng(seed)
    tiles = np.where(random.random(count) < 0.2, 0, random.integers(1, 6, count))
    return SimpleNamespace(tokens=random.integers(5, 50, count) + 9 * tiles, tiles=tiles)


def make_plan(lengths, *, epoch=0, **settings):
    planner = Planner(**{"rows": 4, "max_length": MAX_LENGTH, "packed": True, **settings})
    return planner.plan(lengths.tokens, lengths.tiles, epoch)


def samples_of(batches):
    return [sample for batch in batches for row in batch for sample in row]


samples = st.lists(st.tuples(st.integers(0, MAX_LENGTH), st.integers(0, 6)), max_size=60)
flags = {"packed": st.booleans(), "grouped": st.booleans()}


@given(
    pairs=samples, rows=st.integers(1, 5), max_tiles=st.sampled_from([None, 6, 10]), per_step=st.integers(1, 3), **flags
)
def test_every_sample_comes_once_and_no_limit_is_passed(pairs, rows, max_tiles, per_step, packed, grouped):
    lengths = lengths_of(pairs)
    batches = make_plan(
        lengths, packed=packed, grouped=grouped, rows=rows, max_tiles=max_tiles, batches_per_step=per_step
    )
    assert sorted(samples_of(batches)) == np.flatnonzero(lengths.tokens).tolist()  # no tokens: no sample
    for batch in batches:
        assert 1 <= len(batch) <= rows
        assert all(1 <= sum(lengths.tokens[row]) <= MAX_LENGTH for row in batch)
        assert packed or all(len(row) == 1 for row in batch)
        assert max_tiles is None or sum(lengths.tiles[samples_of([batch])]) <= max_tiles


@given(seed=st.integers(0, 5), epoch=st.integers(0, 5), **flags)
def test_a_plan_is_a_function_of_lengths_seed_and_epoch(seed, epoch, packed, grouped):
    lengths = mixed_lengths(200)

    def make(seed, epoch):
        return make_plan(lengths, seed=seed, epoch=epoch, packed=packed, grouped=grouped)

    assert make(seed, epoch) == make(seed, epoch)
    assert make(seed, epoch) != make(seed + 1, epoch)
    assert make(seed, epoch) != make(seed, epoch + 1)
    assert make(seed, epoch + 1) != make(seed + 1, epoch)


def test_a_plan_stays_the_same_in_later_versions():
    """A run that is resumed after an update must go on with the same batches."""
    lengths = lengths_of([(10 * number, number % 3) for number in range(1, 9)])
    assert make_plan(lengths, seed=42, rows=2) == PACKED
    assert make_plan(lengths, seed=42, rows=2, packed=False) == GROUPED


def test_samples_are_spread_over_the_whole_epoch():
    """Neighbours in the data must not stay neighbours: half of each half of the plan is of the data's first half."""
    lengths = mixed_lengths(4000)
    for packed in (False, True):
        for grouped in (False, True):
            order = np.array(samples_of(make_plan(lengths, packed=packed, grouped=grouped)))
            share = (order[:2000] < 2000).mean()
            assert 0.45 < share < 0.55  # 0.5 with a standard deviation of 0.008


def test_grouped_batches_are_of_one_kind_and_hold_little_padding():
    lengths = mixed_lengths(4000)
    grouped = make_plan(lengths, packed=False)
    kinds = [set((lengths.tiles[samples_of([batch])] > 0).tolist()) for batch in grouped]
    assert all(len(kind) == 1 for kind in kinds)
    assert fill(grouped, lengths.tokens) > 0.95
    assert fill(make_plan(lengths, packed=False, grouped=False), lengths.tokens) < 0.8


def test_batches_of_one_optimizer_step_are_alike():
    lengths = mixed_lengths(4096)
    batches = make_plan(lengths, packed=False, batches_per_step=8)
    steps = [samples_of(batches[start : start + 8]) for start in range(0, len(batches), 8)]
    mixed = [step for step in steps if len(set((lengths.tiles[step] > 0).tolist())) > 1]
    assert len(mixed) <= 1  # what is left of both kinds at the end
    spread = [np.ptp(lengths.tokens[step]) for step in steps[:-1]]
    assert np.median(spread) < np.ptp(lengths.tokens) / 4


def test_packed_rows_are_full():
    lengths = mixed_lengths(4000)
    rows = [row for batch in make_plan(lengths) for row in batch]
    assert sum(lengths.tokens) / (len(rows) * MAX_LENGTH) > 0.97
    assert fill(make_plan(lengths), lengths.tokens) > 0.97


def test_packed_batches_have_about_the_same_number_of_tiles_each():
    lengths = mixed_lengths(4000)

    def spread(grouped):
        counts = [lengths.tiles[samples_of([batch])].sum() for batch in make_plan(lengths, grouped=grouped)]
        return np.std(counts)

    assert spread(grouped=True) < spread(grouped=False) / 2


def test_the_fill_counts_the_padding_up_to_the_longest_row():
    lengths = lengths_of([(10, 0), (20, 0), (30, 0), (5, 0)])
    assert fill([[[0, 1], [2]]], lengths.tokens) == 1
    assert fill([[[2], [3]]], lengths.tokens) == 35 / 60
    assert fill([], lengths.tokens) == 1


def test_a_search_for_room_ends_early_where_tiles_fill_the_rows(monkeypatch):
    """Each row is full of tiles with one sample, so none of the many open rows takes another."""
    monkeypatch.setattr(plan, "ROWS_TRIED", 2)
    lengths = lengths_of([(10, 6)] * 50)
    assert [len(row) for batch in make_plan(lengths, max_tiles=6) for row in batch] == [1] * 50


def test_a_sample_that_fits_nowhere_is_refused_with_its_number():
    with pytest.raises(ValueError, match=r"sample 1 has 101 tokens, more than max_length=100; .* reject the sample"):
        make_plan(lengths_of([(5, 0), (101, 0)]))
    with pytest.raises(ValueError, match="sample 0 has 7 tiles, more than max_tiles=6"):
        make_plan(lengths_of([(5, 7)]), max_tiles=6)
    with pytest.raises(ValueError, match="rows=0 must be at least 1"):
        Planner(rows=0, max_length=MAX_LENGTH)


def test_no_samples_make_no_batches():
    assert make_plan(lengths_of([])) == []
