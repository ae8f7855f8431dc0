"""Work in many threads whose results come in the order of the items."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import suppress
from itertools import islice
from threading import Thread
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 4  # items for each thread that may be begun or finished before an earlier one is


def in_order(work: Callable[[Item], Result], items: Iterable[Item], num_threads: int) -> Iterator[Result]:
    """Yields `work(item)` for each item, in order.

    At most `AHEAD * num_threads` items are held at a time. The threads are daemons: after Ctrl-C the program need not
    wait for an answer over the network, as `ThreadPoolExecutor` would.
    """
    jobs: queue.SimpleQueue[tuple[Future[Result], Item] | None] = queue.SimpleQueue()

    def run() -> None:
        while (job := jobs.get()) is not None:
            future, item = job
            try:
                future.set_result(work(item))
            except BaseException as error:
                future.set_exception(error)

    def begin(item: Item) -> Future[Result]:
        future: Future[Result] = Future()
        jobs.put((future, item))
        return future

    threads = [Thread(target=run, name=f"batch-{number}", daemon=True) for number in range(num_threads)]
    for thread in threads:
        thread.start()
    rest = iter(items)
    try:
        waiting = deque(map(begin, islice(rest, AHEAD * num_threads)))
        while waiting:
            yield _result(waiting.popleft())
            waiting.extend(map(begin, islice(rest, 1)))
    finally:
        with suppress(queue.Empty):  # nobody waits for these any more
            while True:
                jobs.get_nowait()
        for _ in range(num_threads):
            jobs.put(None)
    for thread in threads:  # all is done; one that frees tensors while Python ends would abort the process
        thread.join()


def _result(future: Future[Result]) -> Result:
    while not future.done():
        wait([future], timeout=1)  # on Windows, Ctrl-C does not end a wait without a timeout
    return future.result()
