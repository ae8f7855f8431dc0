"""Reports: a part whose time does not follow its operations gives a warning, any other part gives none."""

import pytest

from tokenpacker.speed.speed_report import disagreements
from tokenpacker.speed.tables import markdown, mebi, milliseconds, tera


@pytest.fixture
def full() -> dict:
    return {
        "projector": "mlp",
        "batch_size": 1,
        "milliseconds": times(projector=10, prefill=80, first_token=100),
        "flops": {"projector": 100, "prefill": 800, "first_token": 1000},
    }


@pytest.fixture
def packed() -> dict:
    """A quarter of the prefill's operations in a quarter of its time; the projector costs as much as the MLP."""
    return {
        "projector": "token-packer",
        "batch_size": 1,
        "milliseconds": times(projector=10, prefill=20, first_token=40),
        "flops": {"projector": 100, "prefill": 200, "first_token": 400},
    }


def times(**milliseconds: float) -> dict:
    return {part: {"median": value, "p95": value} for part, value in milliseconds.items()}


def timed(row: dict, **milliseconds: float) -> dict:
    """The row with other times of some parts."""
    return row | {"milliseconds": row["milliseconds"] | times(**milliseconds)}


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
    costly = packed | {"flops": packed["flops"] | {"projector": 150}}
    (line,) = disagreements(timed(costly, projector=5), full)
    assert "projector: more operations but faster (against mlp 0.67 x by theory, 2.00 x by the clock)" in line


def test_differences_within_the_noise_are_not_said(packed, full):
    close = packed | {"flops": packed["flops"] | {"projector": 97}}
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
