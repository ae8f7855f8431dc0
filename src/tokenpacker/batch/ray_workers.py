"""The same rows on many machines: Ray Data gives them to workers that hold a model each.

Only the places of the rows travel; each worker reads its rows and images itself, so the input and the images must have
the same path on all machines. Ray starts a lost worker anew and repeats its rows.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenpacker.batch.batch_rows import (
    OpenAnswer,
    Outputs,
    Place,
    Prepare,
    Row,
    error_row,
    output_row,
    row_at,
    to_line,
)
from tokenpacker.batch.in_order import in_order
from tokenpacker.whole_files import GO_ON

BLOCK_ROWS = 16  # of one task
LOSSES = 5  # workers that rows may cost, before they and not the machines are to blame
OBJECT_STORE_BYTES = 256 * 2**20  # of a local Ray; the rows of a few hundred tasks need no more


@contextmanager
def ray_outputs(
    address: str,
    source: Path,
    open_answer: OpenAnswer,
    prepare: Prepare,
    *,
    workers: int | None = None,
    concurrency: int = 32,
) -> Iterator[Outputs]:
    """A context that connects to Ray and gives the function that makes output rows of rows, in order.

    Args:
        address: `local` starts Ray for this run; `auto` finds the cluster of this machine; or HOST:PORT.
        source: the input, under the same path on all machines.
        open_answer: loads the model, in each worker.
        prepare: as for `output_row`.
        workers: None makes one for each GPU, or for each machine if there is no GPU.
        concurrency: rows that a worker answers at a time.

    Raises:
        ImportError: without Ray.
        ConnectionError: if there is no cluster at `address`.
        ChildProcessError: if workers cannot start, or are lost again and again.
    """
    _start(address)
    import ray
    from ray.data import ActorPoolStrategy

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    gpus, cpus = (int(sum(machine.get(kind, 0) for machine in machines)) for kind in ("GPU", "CPU"))
    workers = workers or gpus or len(machines)
    options: dict[str, Any] = {"num_gpus": 1} if gpus else {"num_cpus": max(1, cpus // workers)}
    pool = ActorPoolStrategy(
        size=workers,
        max_concurrent_calls_per_actor=-(-concurrency // BLOCK_ROWS),
        enable_true_multi_threading=True,
    )

    def outputs(rows: Iterable[Row]) -> Iterator[dict[str, Any]]:
        known = [replace(row, body=None) for row in rows]
        items = [{"place": list(row.place), "id": row.id} for row in known if row.error is None]
        data = ray.data.from_items(items, override_num_blocks=-(-len(items) // BLOCK_ROWS)).map_batches(
            _Worker,
            fn_constructor_args=(source, open_answer, prepare),
            batch_size=BLOCK_ROWS,
            compute=pool,
            max_restarts=-1,
            max_task_retries=LOSSES,
            **options,
        )
        answered = iter(data.iter_rows() if items else ())
        for row in known:
            output = error_row(row, row.error) if row.error is not None else json.loads(next(answered)["output"])
            assert output["id"] == row.id, "Ray keeps the order"
            yield output

    try:
        yield outputs
    except ray.exceptions.RayActorError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ChildProcessError(f"Ray's workers failed ({reason}); {GO_ON}") from error
    finally:
        ray.shutdown()


def _start(address: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
    )  # silences a warning about GPUs on machines without
    try:
        import ray
        from ray.data import DataContext
    except ImportError:
        raise ImportError("--ray needs Ray; run: pip install 'tokenpacker[ray]'") from None
    local: dict[str, Any] = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **(local if address == "local" else {}))
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    logging.getLogger("ray.data").setLevel(logging.ERROR)


class _Worker:
    """What a process of Ray holds: a model, which answers the rows of several blocks at a time."""

    def __init__(self, source: Path, open_answer: OpenAnswer, prepare: Prepare):
        self.source, self.prepare = source, prepare
        self.opened = open_answer()  # ends with the process
        self.answer = self.opened.__enter__()

    def __call__(self, block: dict[str, Any]) -> dict[str, list[str]]:
        """The output rows of a block, as lines of JSON."""
        rows = [Place(*map(int, place)) for place in block["place"]]
        outputs = in_order(self._output, zip(rows, block["id"], strict=True), BLOCK_ROWS)
        return {"output": [to_line(output).decode() for output in outputs]}

    def _output(self, known: tuple[Place, str]) -> dict[str, Any]:
        place, row_id = known
        return output_row(row_at(self.source, place, str(row_id)), self.answer, self.prepare)
