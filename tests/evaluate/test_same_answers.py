"""The HTTP endpoint answers as `evaluate` does; lmms-eval's part is in tests/plugins/test_lmms_eval.py."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch

from fake_engine import data_url, question, serving
from same_questions import evaluated, same_questions
from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor, carried_model_path
from tokenpacker.serve.embedded import EmbeddedEngine


def test_the_endpoint_gives_the_answers_and_the_score_of_evaluate(tmp_path, monkeypatch):
    folder = carried_model_path()
    model = TokenPackerForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor = TokenPackerProcessor.from_pretrained(folder)
    samples = same_questions()
    bench, answers, accuracy = evaluated(samples, tmp_path / "out", model, processor, monkeypatch)
    bodies = [
        question(asked.text, data_url(sample.image), temperature=0, max_tokens=8)
        for sample in samples
        for asked in sample.questions
    ]
    engine = EmbeddedEngine(model, processor, max_waiting=64)
    with serving(engine) as address, httpx.Client(base_url=address, timeout=60) as client:

        def ask(body: dict) -> str:
            response = client.post("/v1/chat/completions", json=body)
            assert response.status_code == 200, response.text
            return response.json()["choices"][0]["message"]["content"].strip()

        with ThreadPoolExecutor(16) as pool:
            theirs = list(pool.map(ask, bodies))
    engine.close(0)
    assert theirs == answers
    assert len(set(answers)) > 20  # or this test would prove nothing
    by_id = {asked.id: answer for asked, answer in zip(bench.loaded.questions, theirs, strict=True)}
    scored = bench.metric.aggregate(bench.metric.rows(bench.loaded.questions, by_id))
    assert scored["accuracy"] == pytest.approx(accuracy)
    assert accuracy > 50
