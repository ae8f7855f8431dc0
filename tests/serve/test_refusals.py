import time
from unittest import mock

import pytest

from tokenpacker.serve.refusals import LONGEST_WAIT_S, Refusals


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand: `clock.monotonic.return_value = seconds`."""
    clock = mock.Mock(spec=time)
    clock.monotonic.return_value = 0.0
    monkeypatch.setattr("tokenpacker.serve.refusals.time", clock)
    return clock


@pytest.fixture
def refusals(clock) -> Refusals:
    """Of a server that ended 20 requests in 10 seconds: 2 a second."""
    refusals = Refusals()
    refusals.wait(1)
    for number in range(20):
        clock.monotonic.return_value = (number + 1) / 2
        refusals.end()
    return refusals


def test_a_client_comes_back_when_those_before_it_are_answered(refusals):
    assert refusals.retry_after_s(waiting=8, running=0) == 4


def test_idle_time_does_not_lower_the_rate(refusals, clock):
    refusals.wait(0)
    clock.monotonic.return_value += 86_400
    assert refusals.retry_after_s(waiting=8, running=0) == 4
    refusals.wait(1)
    clock.monotonic.return_value += 1
    refusals.end()
    assert refusals.retry_after_s(waiting=20, running=0) == 11  # 21 in 11 seconds; one client returns before it


def test_requests_of_a_server_with_little_to_do_tell_no_rate(clock):
    refusals = Refusals()
    for _ in range(9):
        clock.monotonic.return_value += 60
        refusals.end()
    assert refusals.retry_after_s(waiting=64, running=16) == 1


def test_clients_that_were_refused_come_back_one_after_the_other(refusals, clock):
    assert [refusals.retry_after_s(waiting=8, running=0) for _ in range(6)] == [4, 5, 5, 6, 6, 7]
    clock.monotonic.return_value += 30  # all have been back
    assert refusals.retry_after_s(waiting=8, running=0) == 16  # at 20 in 40 seconds


def test_a_flood_of_requests_does_not_send_a_client_away_for_long(refusals):
    waits = [refusals.retry_after_s(waiting=8, running=620) for _ in range(10_000)]  # 64 a second
    assert max(waits) == 5  # 264 clients, of the 10,008


def test_no_client_is_sent_away_for_longer_than_two_minutes(refusals):
    assert refusals.retry_after_s(waiting=10_000, running=0) == LONGEST_WAIT_S


def test_without_a_rate_a_client_comes_back_in_a_second(clock):
    assert Refusals().retry_after_s(waiting=64, running=16) == 1
