"""The embedded engine as what answers rows, and what tells one model folder from another."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenpacker.batch.batch_rows import Answer, Reply

if TYPE_CHECKING:
    from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor

ONE_DAY_S = 86_400.0
SAMPLES, SAMPLE_BYTES = 256, 4096  # of a file; weights of other training differ nearly everywhere


@contextmanager
def embedded_answer(
    load: Callable[[], tuple[TokenPackerForConditionalGeneration, TokenPackerProcessor]],
    *,
    model: str,
    allowed_hosts: tuple[str, ...] = (),
    concurrency: int = 32,
) -> Iterator[Answer]:
    """A context with a model in this process.

    Args:
        load: loads model and processor.
        model: the name that requests give.
        allowed_hosts: hosts that images may be fetched from.
        concurrency: most calls at a time.
    """
    from tokenpacker.serve.chat_requests import answer
    from tokenpacker.serve.embedded import EmbeddedEngine
    from tokenpacker.serve.limits import Limits
    from tokenpacker.serve.server import ServeSettings

    rules = ServeSettings(model=model, allowed_hosts=allowed_hosts, limits=Limits(request_s=ONE_DAY_S))
    engine = EmbeddedEngine(*load(), max_waiting=concurrency)

    def answered(body: dict[str, Any]) -> Reply:
        return Reply(*answer(engine, body, rules))

    try:
        yield answered
    finally:
        engine.close(0)


def model_digest(folder: Path) -> str:
    """A hash of a model folder's files: of their names, their sizes, and samples of their content."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(size // SAMPLES, SAMPLE_BYTES)):
                file.seek(start)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
