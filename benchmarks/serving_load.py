"""The part about load: answers, throughput and memory of a server that many clients ask at once."""

from __future__ import annotations

import asyncio
import json
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from benchmarks.serving_clients import Request, Server, body_of, send_all, serving
from tokenpacker.hf import carried_model_path
from tokenpacker.progress import Progress
from tokenpacker.scenes import FinePrint

MAX_TOKENS = {"short": 8, "long": 64}  # every true short answer is shorter
PLANS: tuple[dict[str, int], ...] = ({}, {}, {"scale_factor": 3}, {"scale_factor": 4}, {"max_image_tokens": 200})
DESCRIBE = "describe the image."
WARM_UP, ROUNDS, FLAT, ONE_BY_ONE = 500, 6, 1.02, 200  # requests a round, most rounds, growth, requests


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
            plan = draw.choice(PLANS)
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


def warm_up(server: Server, clients: int, answers: str) -> tuple[int, float]:
    """Sends other requests until the server's memory is flat.

    Returns:
        Their number, and the most memory in MiB while the last of them were answered.
    """
    draw, samples, highest = random.Random(2), FinePrint("train"), [math.inf]
    for number in range(ROUNDS):
        requests = []
        for index in range(number * WARM_UP, (number + 1) * WARM_UP):
            options = {"max_tokens": MAX_TOKENS[answers], "stream": draw.random() < 0.5, **draw.choice(PLANS)}
            requests.append(Request("good", body_of(samples[index].image, DESCRIBE, **options)))
        _, _, memory = asyncio.run(send_all(server, requests, clients))
        highest.append(max(mib for _, mib in memory))
        if number and highest[-1] < FLAT * highest[-2]:
            break
    return (number + 1) * WARM_UP, highest[-1]


def measure_load(
    program: Sequence[str], engine: str, requests: Sequence[Request], clients: int, answers: str
) -> dict[str, Any]:
    """Correctness, throughput and memory under load, and the throughput for one client."""
    folder = carried_model_path()
    with serving(program, folder, engine) as server:
        warmed_up, before = warm_up(server, clients, answers)
        cpu_s = time.process_time()
        outcomes, seconds, memory = asyncio.run(send_all(server, requests, clients))
        cpu_s = time.process_time() - cpu_s
    good = [outcome for outcome in outcomes if outcome.request.kind == "good"]
    bad = [outcome for outcome in outcomes if outcome.request.kind == "bad"]
    wrong = [outcome for outcome in good if outcome.status != 200 or outcome.text != outcome.request.expected]
    first = [outcome.first_token_s for outcome in good if outcome.first_token_s is not None]
    alone = [request for request in requests if request.kind == "good"][:ONE_BY_ONE]
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
        "client_cores": cpu_s / seconds,
        "warm_up_requests": warmed_up,
        "memory_mib": [before, *(mib for _, mib in memory)],
        "memory_growth": max(mib for _, mib in memory) / before - 1,
    }
