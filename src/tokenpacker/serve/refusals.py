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

    Without the second part all of them would come back at once, and most would be refused again.
    """

    def __init__(self) -> None:
        self._ended_at: deque[float] = deque(maxlen=RECENT)
        self._returning: deque[float] = deque(maxlen=MOST_RETURNING)

    def begin(self) -> None:
        """Says that the first request after a pause came: the rate is that of a busy server."""
        self._ended_at = deque([time.monotonic()], maxlen=RECENT)

    def end(self) -> None:
        """Says that a request ended."""
        self._ended_at.append(time.monotonic())

    def retry_after_s(self, waiting: int, running: int) -> int:
        """Whole seconds for the next refused client, at the recent rate."""
        now, ended = time.monotonic(), len(self._ended_at) - 1  # after the first time
        self._returning = deque((back for back in self._returning if back > now), MOST_RETURNING)
        seconds = 1
        if ended >= 1:
            # Those that run count too: the first to end would else tell of a rate that is many times too low.
            rate = (ended + running) / max(now - self._ended_at[0], 1e-3)
            seconds = max(1, min(math.ceil((waiting + len(self._returning)) / rate), LONGEST_WAIT_S))
        self._returning.append(now + seconds)
        return seconds
