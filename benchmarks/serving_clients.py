"""A server in a process of its own, and the clients that ask it."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import random
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from PIL import Image

from tokenpacker.progress import Progress

MIB = 1024 * 1024
CACHE_MIB = 64  # so that the warm-up fills the cache of images; none of them comes twice
# vLLM on a CPU would take nearly all memory for its cache, and bind its threads to single cores.
SETTINGS = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@dataclass
class Request:
    """One request and what is expected of it.

    Args:
        kind: `good`, `leaves` or `bad`.
        expected: the answer of `generate`; None for a bad request.
    """

    kind: str
    body: dict[str, Any]
    content: bytes | None = None  # instead of the body
    expected: str | None = None


@dataclass
class Outcome:
    """What became of a request: status 0 is a client that left, -1 a broken connection."""

    request: Request
    status: int
    text: str = ""
    seconds: float = 0.0
    first_token_s: float | None = None
    retries: int = 0
    usage: dict[str, Any] = field(default_factory=dict)


def body_of(image: Image.Image, question: str, **options: Any) -> dict[str, Any]:
    """A chat request in OpenAI's form, at temperature 0."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    address = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}], "temperature": 0, **options}


class Server:
    """A running `tokenpacker serve`."""

    def __init__(self, program: Sequence[str], folder: Path, engine: str, log: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [*program, "serve", "--model", str(folder), "--engine", engine, "--port", str(self.port)]
        command += ["--cache", str(CACHE_MIB)] if engine == "embedded" else []
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | SETTINGS)
        self.address, self.log, self.model = f"http://127.0.0.1:{self.port}", log, ""

    def wait(self, seconds: float = 600) -> float:
        """Returns the seconds until the server is ready. Raises RuntimeError with its last words if it never is."""
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            if self.process.poll() is not None:
                break
            try:
                if httpx.get(f"{self.address}/health", timeout=5).status_code == 200:
                    self.model = httpx.get(f"{self.address}/v1/models", timeout=5).json()["data"][0]["id"]
                    return time.perf_counter() - start
            except httpx.TransportError:
                time.sleep(0.2)
        raise RuntimeError(f"the server did not start: {self.log.read_text(errors='replace')[-2000:]}")

    def memory_mib(self) -> float:
        """Resident memory of the server and its child processes."""
        process = psutil.Process(self.process.pid)
        return sum(one.memory_info().rss for one in [process, *process.children(recursive=True)]) / MIB

    def stop(self) -> float:
        """Ends the server by SIGTERM; returns the seconds that it took."""
        start = time.perf_counter()
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        return time.perf_counter() - start


@contextmanager
def serving(program: Sequence[str], folder: Path, engine: str) -> Iterator[Server]:
    """A server that answers, for the length of the context."""
    with tempfile.TemporaryDirectory() as logs:
        server = Server(program, folder, engine, Path(logs) / "log")
        try:
            server.wait()
            yield server
        finally:
            server.stop()


async def send(client: httpx.AsyncClient, model: str, request: Request, leaves_after_s: float = 0.0) -> Outcome:
    """Sends one request; waits and tries again as long as the server is busy."""
    headers = {"Content-Type": "application/json"}
    content = json.dumps({"model": model, **request.body}).encode() if request.content is None else request.content
    retries = 0
    while True:
        start = time.perf_counter()
        try:
            async with client.stream("POST", "/v1/chat/completions", content=content, headers=headers) as response:
                if response.status_code == 429:
                    retries += 1
                    await response.aread()
                    await asyncio.sleep(float(response.headers["Retry-After"]) * random.uniform(0.5, 1))
                    continue
                if request.kind == "leaves":
                    await asyncio.sleep(leaves_after_s)
                    return Outcome(request, 0)
                return await _read(request, response, start, retries)
        except httpx.TransportError:
            return Outcome(request, -1)


async def _read(request: Request, response: httpx.Response, start: float, retries: int) -> Outcome:
    outcome = Outcome(request, response.status_code, retries=retries)
    if response.headers["content-type"].startswith("text/event-stream"):
        finished = False
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                finished = True
            elif line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                outcome.usage = event.get("usage") or outcome.usage
                for choice in event.get("choices", []):
                    piece = choice["delta"].get("content") or ""
                    if piece and outcome.first_token_s is None:
                        outcome.first_token_s = time.perf_counter() - start
                    outcome.text += piece
        if not finished:
            outcome.status = -1
    else:
        answer = json.loads(await response.aread())
        if outcome.status == 200:
            outcome.text, outcome.usage = answer["choices"][0]["message"]["content"], answer["usage"]
    outcome.seconds = time.perf_counter() - start
    outcome.text = outcome.text.strip()
    return outcome


async def send_all(server: Server, requests: Sequence[Request], clients: int) -> tuple[list[Outcome], float, list]:
    """All outcomes, the seconds, and the server's memory after each twentieth of the requests."""
    waiting, outcomes, memory = iter(requests), [], []
    draw = random.Random(1)
    certificates = httpx.create_ssl_context()  # takes 20 ms to make
    start = time.perf_counter()
    with Progress(f"{clients} clients", len(requests)) as shown:

        async def work() -> None:  # a connection of its own; a shared pool takes longer than the requests themselves
            async with httpx.AsyncClient(base_url=server.address, timeout=600, verify=certificates) as client:
                for request in waiting:
                    outcomes.append(await send(client, server.model, request, draw.uniform(0, 0.5)))
                    shown.update(len(outcomes))
                    if len(outcomes) % max(len(requests) // 20, 1) == 0:
                        memory.append((len(outcomes) / len(requests), server.memory_mib()))

        await asyncio.gather(*(work() for _ in range(clients)))
    return outcomes, time.perf_counter() - start, memory
