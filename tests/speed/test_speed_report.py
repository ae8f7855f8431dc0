"""Reports: where theory and clock disagree is said, and where they agree nothing is."""

from dataclasses import replace

import pytest

from tokenpacker.speed.flops import Flops
from tokenpacker.speed.model_sizes import candidates, named_shapes
from tokenpacker.speed.speed_report import disagreements
from tokenpacker.speed.speed_rows import Counted, SpeedRow
from tokenpacker.speed.stopwatch import Spread
from tokenpacker.speed.tables import markdown, mebi, milliseconds, tera

COUNTED = Counted(
    tiles=1,
    tokens_per_tile=576,
    image_tokens=576,
    prompt_tokens=640,
    output_tokens=128,
    cache_bytes=0,
    full_cache_bytes=0,
    peak_bytes=None,
)


def same(milliseconds: float) -> Spread:
    return Spread(milliseconds, milliseconds)


@pytest.fixture
def full() -> SpeedRow:
    return SpeedRow(
        candidate=candidates(named_shapes("small"))[-1],
        batch_size=1,
        counted=COUNTED,
        times={
            "vision": same(10),
            "projector": same(10),
            "prefill": same(80),
            "first_token": same(100),
            "per_output_token": same(1),
            "total": same(227),
        },
        flops=Flops(vision=100, projector=100, language=700, head=100, decode=1270),
    )


@pytest.fixture
def packed(full) -> SpeedRow:
    """A quarter of the prefill's operations in a quarter of its time; the projector costs as much as the MLP."""
    flops = replace(full.flops, language=175, head=25)
    packer = candidates(named_shapes("small"))[0]
    return timed(replace(full, candidate=packer, flops=flops), prefill=20, first_token=40)


def timed(row: SpeedRow, **milliseconds: float) -> SpeedRow:
    """The row with other times of some parts."""
    return replace(row, times=row.times | {part: same(value) for part, value in milliseconds.items()})


def test_nothing_is_said_where_time_follows_operations(packed, full):
    assert list(disagreements(packed, full)) == []
    assert list(disagreements(full, full)) == []


def test_fewer_operations_that_take_longer_are_said(packed, full):
    (line,) = disagreements(timed(packed, first_token=120), full)
    assert line == (
        "token-packer at batch 1, first token: fewer operations but slower (against mlp 2.50 x by theory, 0.83 x by the"
        " clock)"
    )


def test_less_than_half_of_the_promise_is_said(packed, full):
    (line,) = disagreements(timed(packed, prefill=42), full)
    assert "prefill: less than half of the speed-up that theory promises (against mlp 4.00 x" in line
    assert list(disagreements(timed(packed, prefill=38), full)) == []


def test_more_operations_that_take_less_time_are_said(packed, full):
    costly = replace(packed, flops=replace(packed.flops, projector=150))
    (line,) = disagreements(timed(costly, projector=5), full)
    assert "projector: more operations but faster (against mlp 0.67 x by theory, 2.00 x by the clock)" in line


def test_differences_within_the_noise_are_not_said(packed, full):
    close = replace(packed, flops=replace(packed.flops, projector=97))
    assert list(disagreements(timed(close, projector=10.4), full)) == []


def test_a_table_lines_up_with_text_to_the_left():
    assert markdown(["name", "n"], [["mlp", "1,000"], ["average-pool", "-"]]) == [
        "| name         |     n |",
        "| :----------- | ----: |",
        "| mlp          | 1,000 |",
        "| average-pool |     - |",
    ]


def test_numbers_have_three_digits():
    assert [tera(value) for value in (10**9, 17 * 10**12, 123_456 * 10**12)] == ["0.00100", "17.0", "123,456"]
    assert [milliseconds(value) for value in (0.5, 12.345, 99.96, 1234.5)] == ["0.500", "12.3", "100", "1,234"]
    assert (mebi(2**19), mebi(None)) == ("0.500", "-")
