"""Training runs in processes of their own, small enough to be killed often; what they saw is written down.

A fork server holds the imported libraries, so that a start takes a fraction of a second.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

SECONDS = 120  # after which a start hangs

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["transformers.trainer", "transformers.models.auto.modeling_auto", "peft", "tokenpacker.train.run", "train_runs"]
)


@dataclass(frozen=True)
class Death:
    """When a process kills itself with SIGKILL: `delay` seconds into its `count`-th step or evaluation, or at a file.

    The latter counts every opening and removing of a file in a checkpoint.
    """

    at: str  # "step", "evaluation" or "file"
    count: int
    delay: float = 0.0


@dataclass(frozen=True)
class Start:
    """One call of `train`, on some processes, with what is done to it."""

    config: Mapping[str, Any]
    output: Path
    num_processes: int = 1
    death: Death | None = None
    signals: Sequence[tuple[float, int]] = ()  # (seconds to wait, number), sent to its group before the second step
    max_file_bytes: int | None = None  # from its fifth step on: a disk that is full
    kills_worker: bool = False  # in the first step
    environment: Mapping[str, str] = field(default_factory=dict)


def start(run: Start) -> list[int]:
    """Runs to the end and gives the exit codes of all processes; where one dies, the others are killed."""
    port, number = _free_port(), time.monotonic_ns()
    processes = [
        PROCESSES.Process(target=_process, args=(run, rank, port, number)) for rank in range(run.num_processes)
    ]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        multiprocessing.connection.wait([process.sentinel for process in processes if process.is_alive()], SECONDS)
        if any(process.exitcode for process in processes) or all(process.is_alive() for process in processes):
            for process in processes:  # as a launcher does
                process.kill()
        for process in processes:
            if not process.is_alive() or process.exitcode is not None:
                process.join()
    return [process.exitcode for process in processes]


def seen(output: Path) -> list[tuple[int, str]]:
    """(step, id) of the samples that the run was computed from: what was lost with a process does not count."""
    entries = [json.loads(line) for path in output.glob("seen-*.jsonl") for line in path.read_text().splitlines()]
    last = {}  # start that did a step, of all that began it
    for entry in entries:
        last[entry["step"]] = max(entry["start"], last.get(entry["step"], 0))
    kept = [entry for entry in entries if entry["start"] == last[entry["step"]]]
    return [
        (entry["step"], id)
        for entry in sorted(kept, key=lambda e: (e["step"], e["place"]))
        for id in entry["ids"]
        if id
    ]


def history(output: Path) -> list[dict[str, float]]:
    """What was logged of each step."""
    return json.loads((output / "history.json").read_text())["steps"]


def evaluations(output: Path) -> list[dict[str, float]]:
    """What was measured, without the time that it took."""
    found = json.loads((output / "history.json").read_text())["evaluations"]
    return [{key: value for key, value in entry.items() if key != "eval_seconds"} for entry in found]


def error(output: Path) -> str:
    """What the last start ended with."""
    return (output / "error.txt").read_text()


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _process(run: Start, rank: int, port: int, number: int) -> None:
    import torch

    multiprocessing.set_start_method("fork", force=True)  # of its workers, as usual; not another fork server
    os.setpgrp()  # signals to a group reach its workers and not the tests
    torch.set_num_threads(1)  # sums in one order, and two processes do not fight
    os.environ.update(run.environment)
    if run.num_processes > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(run.num_processes),
            "LOCAL_WORLD_SIZE": str(run.num_processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    from tokenpacker.train.config import from_dict
    from tokenpacker.train.run import train

    run.output.mkdir(parents=True, exist_ok=True)
    warnings.showwarning = partial(_note_warning, run.output)
    _watch_steps(run, rank, number)
    if run.death is not None and run.death.at == "file":
        _die_at_file(run.death.count)
    try:
        train(from_dict(run.config), run.output)
    except Exception as raised:
        (run.output / "error.txt").write_text(f"{type(raised).__name__}: {raised}")
        sys.exit(3)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _note_warning(output: Path, message: Warning | str, *place: Any, **more: Any) -> None:
    with open(output / "warnings.txt", "a") as file:
        file.write(f"{message}\n")


def _watch_steps(run: Start, rank: int, number: int) -> None:
    """Writes down which samples each step sees, and lets things happen in it."""
    from tokenpacker.data.batches import IDS
    from tokenpacker.train.trainer import PartTrainer

    original = PartTrainer.training_step
    calls = 0

    def training_step(self: PartTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        place = len(self.ids_of_step) * run.num_processes + rank
        entry = {"step": self.state.global_step, "start": number, "place": place, "ids": inputs[IDS]}
        with open(run.output / f"seen-{rank}.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")
        _trouble(run, calls, self.state.global_step)
        return original(self, model, inputs, *args, **kwargs)

    PartTrainer.training_step = training_step
    _signal_before_second_step(run.signals)
    if run.death is not None and run.death.at == "evaluation":
        _die_in_evaluation(run.death)


def _signal_before_second_step(signals: Sequence[tuple[float, int]]) -> None:
    """From another process, as to its parent a worker listens in any case; and while batches are still needed."""
    from tokenpacker.train.trainer import PartTrainer

    original = PartTrainer.get_batch_samples

    def get_batch_samples(self: PartTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 1 and signals:
            messenger = multiprocessing.Process(target=_send, args=(signals, os.getpgrp()))
            messenger.start()
            messenger.join()
        return original(self, *args, **kwargs)

    PartTrainer.get_batch_samples = get_batch_samples


def _die_in_evaluation(death: Death) -> None:
    from tokenpacker.train.evaluating import EvaluatingTrainer

    original, left = EvaluatingTrainer._held_out_loss, death.count

    def held_out_loss(self: EvaluatingTrainer, *args: Any) -> float:
        nonlocal left
        left -= 1
        if left == 0:
            threading.Timer(death.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
            time.sleep(death.delay)
        return original(self, *args)

    EvaluatingTrainer._held_out_loss = held_out_loss


def _send(signals: Sequence[tuple[float, int]], group: int) -> None:
    for _, number in signals:
        signal.signal(number, signal.SIG_IGN)
    for seconds, number in signals:
        time.sleep(seconds)
        os.killpg(group, number)


def _trouble(run: Start, calls: int, step: int) -> None:
    death = run.death
    if death is not None and death.at == "step" and calls == death.count:
        threading.Timer(death.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
    if run.kills_worker and calls == 1:
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    if run.max_file_bytes is not None and step == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (run.max_file_bytes, resource.RLIM_INFINITY))


def _die_at_file(count: int) -> None:
    left = count

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in ("open", "os.remove", "os.rmdir") and "checkpoint-" in str(arguments[0]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def sharded_step(folder: Path, batches: Sequence[Sequence[dict[str, Any]]]) -> list[tuple[float, float]]:
    """Loss and gradient norm of two steps with the model of a folder spread over a process for each item of a step."""
    port = _free_port()
    results = PROCESSES.SimpleQueue()
    size = len(batches[0])
    processes = [
        PROCESSES.Process(target=_sharded, args=(folder, [step[rank] for step in batches], rank, size, port, results))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)  # a collective that one process does not take part in waits for ever
        process.kill()
    assert [process.exitcode for process in processes] == [0] * size
    return results.get()


def _sharded(folder: Path, batches: Sequence[dict[str, Any]], rank: int, size: int, port: int, results: Any) -> None:
    import torch
    from torch.distributed.fsdp import fully_shard

    from tokenpacker.hf import TokenPackerForConditionalGeneration

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    mesh = torch.distributed.init_device_mesh("cpu", (size,))
    model = TokenPackerForConditionalGeneration.from_pretrained(folder)
    model.model.vision_tower.requires_grad_(False)
    for part in (model.model.multi_modal_projector, *model.model.language_model.layers, model):
        fully_shard(part, mesh=mesh)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    steps = []
    for batch in batches:
        targets = (batch["labels"][:, 1:] != -100).sum()
        torch.distributed.all_reduce(targets)
        loss = model(**batch, num_items_in_batch=targets).loss
        (loss * size).backward()  # fully_shard takes the mean over processes
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).full_tensor()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        steps.append((float(total), float(norm)))
    if rank == 0:
        results.put(steps)
    torch.distributed.destroy_process_group()
