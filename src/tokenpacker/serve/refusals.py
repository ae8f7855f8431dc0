"""When a client that was refused should try again."""

from __future__ import annotations

import math
import time
from collections import deque

RECENT = 64  # ended requests that the rate is taken from
LONGEST_WAIT_S = 120  # that a client is told
MOST_RETURNING = 256  # clients that count as being ahead, so that a flood of requests does not send everybody away


class Refusals:
    """Tells each refused client a time at which there is room: after those that wait and those refused before it.

    Without the second part all of them would come back at once, and most would be refused again. The rate is that of
    the time in which requests waited; a server that has little to do shows no rate.
    """

    def __init__(self) -> None:
        self._waited_s = 0.0  # time with requests that wait, before `_since`
        self._since: float | None = None
        self._ended_at: deque[float] = deque([0.0], RECENT)  # on that clock
        self._returning: deque[float] = deque(maxlen=MOST_RETURNING)

    def wait(self, waiting: int) -> None:
        """Says how many requests wait now."""
        if waiting and self._since is None:
            self._since = time.monotonic()
        elif not waiting:
            self._waited_s, self._since = self._clock(), None

    def end(self) -> None:
        """Says that a request ended."""
        if self._since is not None:
            self._ended_at.append(self._clock())

    def retry_after_s(self, waiting: int, running: int) -> int:
        """Whole seconds for the next refused client."""
        now, ended = time.monotonic(), len(self._ended_at) - 1  # after the first time
        self._returning = deque((back for back in self._returning if back > now), MOST_RETURNING)
        seconds = 1
        if ended:
            # Those that run count too: the first to end would else tell of a rate that is many times too low.
            rate = (ended + running) / max(self._clock() - self._ended_at[0], 1e-3)
            seconds = max(1, min(math.ceil((waiting + len(self._returning)) / rate), LONGEST_WAIT_S))
        self._returning.append(now + seconds)
        return seconds

    def _clock(self) -> float:
        return self._waited_s + (0.0 if self._since is None else time.monotonic() - self._since)
