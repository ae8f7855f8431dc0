"""The server under load, and what an image costs it at 36, 64, 144 and 576 tokens.

    python -m benchmarks.serving --json docs/serving-benchmark.json --vllm .venvs/vllm/bin/tokenpacker

**Load**: 200 clients send 2,000 requests about images of many sizes to the carried model; 5 % leave before their answer
is complete, 5 % send something broken. Every good request must get the answer that `generate` gives for it alone. 1,000
other requests warm the server up. Then one client sends the first 500 good ones to a fresh server, one by one. The
answers are a word or two. `--answers long` asks for descriptions of up to 64 tokens, in a fifth of the requests.

**Tokens**: a model of random weights with CLIP-L/336's patch grid gives answers of 64 tokens at four scale factors, to
one client and to sixteen. Every request has an image of its own, so that no cache helps.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, LlamaConfig

from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor, carried_model_path
from tokenpacker.progress import Progress
from tokenpacker.scenes import FinePrint
from tokenpacker.speed.machine import describe_machine, machine_text, versions_text
from tokenpacker.speed.model_sizes import SMALL_TEXT, named_shapes
from tokenpacker.speed.tables import markdown

MAX_TOKENS = {"short": 8, "long": 64}  # every true short answer is shorter
DESCRIBE = "describe the image."
SHARE = {"short": 1, "long": 5}  # of the requests
WARM_UP, ONE_BY_ONE = 1000, 500  # requests
TOKEN_COUNTS = {4: 36, 3: 64, 2: 144, 1: 576}  # scale factor -> packed tokens of 24 x 24 patches
TOGETHER = 16  # clients at once in the part about tokens; the engine's batch has as many rows
ANSWER = 64  # tokens of each answer of the random model
MIB = 1024 * 1024
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


def make_requests(count: int, folder: Path, answers: str) -> list[Request]:
    """The requests of the load test, and the offline answers to the good ones."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    draw, samples = random.Random(0), FinePrint("test")
    requests = []
    with Progress("offline answers", count) as shown:
        for index in range(count):
            sample = samples[index]
            question = draw.choice(sample.questions).text if answers == "short" else DESCRIBE
            plan = draw.choice(({}, {}, {"scale_factor": 3}, {"scale_factor": 4}, {"max_image_tokens": 200}))
            body = body_of(sample.image, question, max_tokens=MAX_TOKENS[answers], stream=draw.random() < 0.5, **plan)
            kind = draw.choices(("good", "leaves", "bad"), (90, 5, 5))[0]
            if kind == "bad":
                requests.append(_broken(body, draw))
            else:
                answer = _offline(model, processor, sample.image, question, MAX_TOKENS[answers], plan)
                requests.append(Request(kind, body | ({"stream": True} if kind == "leaves" else {}), expected=answer))
            shown.update(index + 1)
    return requests


def _broken(body: dict[str, Any], draw: random.Random) -> Request:
    way = draw.randrange(4)
    if way == 0:
        return Request("bad", {}, json.dumps(body).encode()[: draw.randrange(1, 200)])
    if way == 1:
        return Request("bad", body | {"scale_factor": 0})
    if way == 2:
        return Request("bad", body | {"temperature": "warm"})
    url = body["messages"][0]["content"][0]["image_url"]
    url["url"] = url["url"][: 60 + draw.randrange(100)]  # a truncated picture
    return Request("bad", body)


@torch.inference_mode()
def _offline(
    model: Any, processor: Any, image: Image.Image, question: str, max_tokens: int, plan: dict[str, Any]
) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs = processor(images=[image], text=[prompt], return_tensors="pt", **plan)
    answer = model.generate(**inputs, do_sample=False, max_new_tokens=max_tokens)
    return processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


class Server:
    """A running `tokenpacker serve`."""

    def __init__(self, program: Sequence[str], folder: Path, engine: str, log: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [*program, "serve", "--model", str(folder), "--engine", engine, "--port", str(self.port)]
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
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    start = time.perf_counter()
    with Progress(f"{clients} clients", len(requests)) as shown:
        async with httpx.AsyncClient(base_url=server.address, timeout=600, limits=limits) as client:

            async def work() -> None:
                for request in waiting:
                    outcomes.append(await send(client, server.model, request, draw.uniform(0, 0.5)))
                    shown.update(len(outcomes))
                    if len(outcomes) % max(len(requests) // 20, 1) == 0:
                        memory.append((len(outcomes) / len(requests), server.memory_mib()))

            await asyncio.gather(*(work() for _ in range(clients)))
    return outcomes, time.perf_counter() - start, memory


def measure_load(
    program: Sequence[str], engine: str, requests: Sequence[Request], clients: int, answers: str
) -> dict[str, Any]:
    """Correctness, throughput and memory under load, and the throughput for one client."""
    folder = carried_model_path()
    samples = FinePrint("train")
    others = [
        Request("good", body_of(samples[index].image, DESCRIBE, max_tokens=MAX_TOKENS[answers]))
        for index in range(WARM_UP // SHARE[answers])
    ]
    with serving(program, folder, engine) as server:
        asyncio.run(send_all(server, others, clients))
        before = server.memory_mib()
        outcomes, seconds, memory = asyncio.run(send_all(server, requests, clients))
    good = [outcome for outcome in outcomes if outcome.request.kind == "good"]
    bad = [outcome for outcome in outcomes if outcome.request.kind == "bad"]
    wrong = [outcome for outcome in good if outcome.status != 200 or outcome.text != outcome.request.expected]
    first = [outcome.first_token_s for outcome in good if outcome.first_token_s is not None]
    alone = [request for request in requests if request.kind == "good"][: ONE_BY_ONE // SHARE[answers]]
    with serving(program, folder, engine) as server:
        one_by_one, seconds_alone, _ = asyncio.run(send_all(server, alone, 1))
    rate, rate_alone = len(good) / seconds, len(alone) / seconds_alone
    return {
        "engine": engine,
        "answers": answers,
        "requests": len(requests),
        "clients": clients,
        "good": len(good),
        "good_answered": sum(outcome.status == 200 for outcome in good),
        "good_equal": len(good) - len(wrong),
        "one_by_one": len(alone),
        "one_by_one_equal": sum(outcome.text == outcome.request.expected for outcome in one_by_one),
        "left": sum(outcome.request.kind == "leaves" for outcome in outcomes),
        "bad": len(bad),
        "bad_statuses": dict(Counter(str(outcome.status) for outcome in bad)),
        "other_statuses": dict(Counter(str(outcome.status) for outcome in good if outcome.status != 200)),
        "retries_after_429": sum(outcome.retries for outcome in outcomes),
        "seconds": seconds,
        "good_per_second": rate,
        "good_per_second_one_by_one": rate_alone,
        "throughput_ratio": rate / rate_alone,
        "tokens_per_answer": sum(outcome.usage.get("completion_tokens", 0) for outcome in one_by_one) / len(one_by_one),
        "median_seconds": statistics.median(outcome.seconds for outcome in good),
        "median_first_token_s": statistics.median(first),
        "memory_mib": [before, *(mib for _, mib in memory)],
        "memory_growth": max(mib for _, mib in memory) / before - 1,
    }


def save_random_model(folder: Path) -> None:
    """A model of random weights with CLIP-L/336's patch grid, one tile an image, that never ends an answer itself."""
    tokenizer = AutoTokenizer.from_pretrained(carried_model_path())
    config = named_shapes("small").config
    config.text_config = LlamaConfig(
        **SMALL_TEXT,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    model = TokenPackerForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.all_special_ids] = 0  # never the largest of all logits
    model.save_pretrained(folder)
    TokenPackerProcessor.from_config(config, tokenizer, image_mode="pad").save_pretrained(folder)


def measure_tokens(program: Sequence[str], engine: str, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Times of one client, and the throughput of one and of many, at each number of tokens an image."""
    numbers = iter(range(10**6))

    def requests(scale_factor: int, count: int) -> list[Request]:
        made = []
        for _ in range(count):
            picture = FinePrint("train")[next(numbers)].image.resize((336, 336))
            options = {"scale_factor": scale_factor, "max_tokens": ANSWER, "stream": True}
            options["stream_options"] = {"include_usage": True}
            made.append(Request("good", body_of(picture, "what is it?", **options)))
        return made

    alone: dict[int, list[Outcome]] = {factor: [] for factor in TOKEN_COUNTS}
    rates: dict[int, list[tuple[float, float]]] = {factor: [] for factor in TOKEN_COUNTS}
    with serving(program, folder, engine) as server:
        for number in range(rounds + 1):  # the first warms up
            for factor in TOKEN_COUNTS:
                single, seconds_alone, _ = asyncio.run(send_all(server, requests(factor, 2), 1))
                many, seconds, _ = asyncio.run(send_all(server, requests(factor, TOGETHER), TOGETHER))
                if number:
                    alone[factor] += single
                    rates[factor].append((_tokens(single) / seconds_alone, _tokens(many) / seconds))
    rows = []
    for factor, tokens in TOKEN_COUNTS.items():
        first = [outcome.first_token_s for outcome in alone[factor] if outcome.first_token_s]
        rest = [
            (one.seconds - one.first_token_s) / (one.usage["completion_tokens"] - 1)
            for one in alone[factor]
            if one.first_token_s
        ]
        rows.append(
            {
                "engine": engine,
                "scale_factor": factor,
                "packed_tokens": tokens,
                "prompt_tokens": alone[factor][0].usage["prompt_tokens"],
                "first_token_ms": 1000 * statistics.median(first),
                "per_token_ms": 1000 * statistics.median(rest),
                "tokens_per_second_1_client": statistics.median(one for one, _ in rates[factor]),
                f"tokens_per_second_{TOGETHER}_clients": statistics.median(many for _, many in rates[factor]),
                "throughput_ratio": statistics.median(many / one for one, many in rates[factor]),
            }
        )
    return rows


def _tokens(outcomes: Sequence[Outcome]) -> int:
    return sum(outcome.usage["completion_tokens"] for outcome in outcomes)


def main() -> None:
    """Runs the parts asked for and prints their tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5, help="of the part about tokens")
    parser.add_argument("--vllm", metavar="PROGRAM", help="the program `tokenpacker` of an environment with vLLM")
    parser.add_argument("--engines", nargs="+", choices=("embedded", "vllm"), default=("embedded", "vllm"))
    parser.add_argument("--answers", choices=("short", "long"), default="short")
    parser.add_argument("--skip", choices=("load", "tokens"), default=None)
    parser.add_argument("--json", type=Path, help="file for all figures")
    asked = parser.parse_args()
    engines = {"embedded": [sys.executable, "-m", "tokenpacker"]} | ({"vllm": [asked.vllm]} if asked.vllm else {})
    engines = {name: program for name, program in engines.items() if name in asked.engines}
    figures: dict[str, Any] = {"machine": describe_machine(torch.device("cpu")), "load": [], "tokens": []}
    if asked.skip != "load":
        requests = make_requests(asked.requests // SHARE[asked.answers], carried_model_path(), asked.answers)
        for name, program in engines.items():
            figures["load"].append(measure_load(program, name, requests, asked.clients, asked.answers))
            _write(figures, asked.json)
    if asked.skip != "tokens":
        with tempfile.TemporaryDirectory() as folder:
            save_random_model(Path(folder))
            for name, program in engines.items():
                figures["tokens"] += measure_tokens(program, name, Path(folder), asked.rounds)
                _write(figures, asked.json)
    print("\n".join(tables(figures)))


def _write(figures: dict[str, Any], file: Path | None) -> None:
    if file:
        file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def tables(figures: dict[str, Any]) -> list[str]:
    """The figures as two Markdown tables."""
    lines = []
    if figures["load"]:
        names = {
            "answers": "answers",
            "good": "good requests",
            "good_equal": "equal to `generate`",
            "left": "clients that left",
            "bad": "broken requests",
            "good_per_second": "good answers a second",
            "good_per_second_one_by_one": "one by one",
            "throughput_ratio": "ratio",
            "median_first_token_s": "seconds to the first token",
            "memory_growth": "memory",
        }
        rows = [[row["engine"], *(_shown(name, row[name]) for name in names)] for row in figures["load"]]
        lines += [*markdown(["engine", *names.values()], rows), ""]
    if figures["tokens"]:
        many = f"tokens/s, {TOGETHER} clients"
        head = ["engine", "tokens an image", "first token, ms", "per token, ms", "tokens/s, 1 client", many, "ratio"]
        rows = [
            [
                row["engine"],
                str(row["packed_tokens"]),
                f"{row['first_token_ms']:.0f}",
                f"{row['per_token_ms']:.1f}",
                f"{row['tokens_per_second_1_client']:.1f}",
                f"{row[f'tokens_per_second_{TOGETHER}_clients']:.1f}",
                f"{row['throughput_ratio']:.2f}",
            ]
            for row in figures["tokens"]
        ]
        lines += [*markdown(head, rows), ""]
    on = figures["machine"]
    return [*lines, f"Machine: {machine_text(on)}; {versions_text(on)}."]


def _shown(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if name == "memory_growth":
        return f"{value:+.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"


if __name__ == "__main__":
    main()
