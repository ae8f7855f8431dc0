"""The same batches on a local Ray. Each start of it takes seconds."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from batch_files import read, request, texts

pytest.importorskip("ray", reason="Ray is not installed: pip install 'tokenpacker[ray]'")
pytestmark = pytest.mark.slow

# A run whose worker dies once, in the middle of its first rows.
LOST = """
import os, sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tokenpacker.batch import Reply, run_batch

@contextmanager
def opened(lost):
    from batch_files import echo

    def answer(body):
        if body["messages"][0]["content"] == "question 7" and not lost.exists():
            lost.touch()
            os._exit(1)
        return echo(body)

    yield answer

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    answers = partial(opened, folder / "lost")
    run_batch(folder / "in.jsonl", folder / "out.jsonl", answers, {"test": "s"}, ray="local")
"""


def environment() -> dict[str, str]:
    path = os.pathsep.join(path for path in sys.path if path)
    return {**os.environ, "PYTHONPATH": path, "RAY_worker_niceness": "0"}  # or other work leaves it no time


def test_rows_of_a_lost_worker_are_answered_once_and_in_order(files):
    rows = [request(f"row-{number}", f"question {number}") for number in range(40)]
    rows[20] = request("row-3", "the same custom_id")
    files.write(*rows[:30], "no JSON", *rows[30:])
    subprocess.run([sys.executable, "-c", LOST, str(files.folder)], env=environment(), check=True, capture_output=True)
    assert (files.folder / "lost").exists()
    answered = read(files.target)
    errors = {number: row["error"]["code"] for number, row in enumerate(answered) if row["error"]}
    assert errors == {20: "duplicate_custom_id", 30: "invalid_json_line"}
    expected = [f"question {number}" for number in range(40) if number != 20]
    assert texts([row for row in answered if not row["error"]]) == expected
    summary, _ = files.run()  # one process goes on where Ray ended
    assert (summary.kept, read(files.target)) == (41, answered)


def test_the_embedded_engine_on_ray_answers_as_in_one_process(files, image_of):
    image_of(60, 90).save(files.folder / "picture.png")
    parts = [{"type": "image_url", "image_url": {"url": "picture.png"}}, {"type": "text", "text": "what is shown?"}]
    files.write(*(request(str(n), messages=[{"role": "user", "content": parts}], max_tokens=9) for n in range(20)))

    def run(target: str, *more: str) -> list[dict]:
        words = ["batch", "in.jsonl", target, "--images", ".", "--model", "tiny", *more]
        command = [sys.executable, "-m", "tokenpacker", *words]
        subprocess.run(command, env=environment(), cwd=files.folder, check=True, capture_output=True)
        return read(files.folder / target)

    here, ray = run("here.jsonl"), run("ray.jsonl", "--ray", "local")
    assert [row["id"] for row in ray] == [row["id"] for row in here]
    assert texts(ray) == texts(here)
