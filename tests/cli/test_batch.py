from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from batch_files import read, request, texts

QUESTIONS = ["what number is in the red box?", "what is shown?"]


@pytest.fixture
def requests(tmp_path, picture):
    """An input about an image beside it."""

    def write(*rows: dict) -> str:
        path = tmp_path / "in.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def about(custom_id: str, question: str, url: str = "picture.png", **body) -> dict:
    image = {"type": "image_url", "image_url": {"url": url}}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": question}]}]
    return request(custom_id, **{"messages": messages, "max_tokens": 30, **body})


def test_answers_are_those_of_ask(run_json, requests, picture, tmp_path):
    source = requests(*(about(question, question) for question in QUESTIONS))
    summary = run_json("batch", source, tmp_path / "out.jsonl", "--images", tmp_path, "--scale-factor", 3)
    asked = [run_json("ask", picture, question, "--scale-factor", 3) for question in QUESTIONS]
    rows = read(tmp_path / "out.jsonl")
    assert texts(rows) == [answer["answer"] for answer in asked]
    assert [row["custom_id"] for row in rows] == QUESTIONS
    assert summary["image_tokens"] == sum(answer["image_tokens"] for answer in asked)
    assert (summary["rows"], summary["errors"], summary["kept"]) == (2, 0, 0)


def test_errors_are_rows_and_the_exit_code(run, requests, tmp_path, tiny_model_dir):
    bad = [about("gone", "what?", "gone.png"), about("other", "what?", model="gpt-7"), about("n", "what?", n=99)]
    source = requests(about("good", "what?", max_tokens=2), *bad)
    command = ("batch", source, tmp_path / "out.jsonl", "--images", tmp_path, "--model", tiny_model_dir)
    result = run(*command)
    assert result.exit_code == 1
    assert "4 rows, 3 errors" in result.stdout
    assert "1 x 404 model_not_found: this model is not served here" in result.stdout
    assert "--retry-failed asks the failed rows again" in result.stderr
    good, gone, other, count = read(tmp_path / "out.jsonl")
    assert good["response"]["status_code"] == 200
    assert gone["error"]["code"] == "invalid_image_path"
    assert other["response"]["body"]["error"]["code"] == "model_not_found"
    assert count["response"]["status_code"] == 400
    again = run(*command)  # nothing is asked again
    assert (again.exit_code, "4 rows (4 of them from an earlier run), 3 errors" in again.stdout) == (1, True)


def test_other_options_than_those_of_the_output_are_refused(run, one_line_error, requests, tmp_path, tiny_model_dir):
    source = requests(request("a", max_tokens=1))
    command = ("batch", source, tmp_path / "out.jsonl", "--model", tiny_model_dir)
    assert run(*command).exit_code == 0
    said = one_line_error(*command, "--scale-factor", 4)
    assert "written with another model or other options" in said
    assert "--overwrite" in said
    assert run(*command, "--scale-factor", 4, "--overwrite").exit_code == 0


REFUSED = {  # options -> a part of the error
    "a key without an endpoint": (["--api-key-env", "KEY"], "--api-key-env needs --endpoint"),
    "workers without Ray": (["--workers", "2"], "--workers needs --ray"),
    "Ray and an endpoint": (["--ray", "local", "--endpoint", "http://x"], "exclude each other"),
    "a device of an endpoint": (["--device", "cpu", "--endpoint", "http://x"], "leave it out with --endpoint"),
    "two ways to go on": (["--overwrite", "--retry-failed"], "exclude each other"),
    "no address": (["--endpoint", "somewhere"], "--endpoint somewhere is no address"),
    "no such model": (["--model", "./none"], "./none"),
    "no key": (["--endpoint", "http://x", "--api-key-env", "NO_SUCH_VARIABLE"], "NO_SUCH_VARIABLE"),
}


@pytest.mark.parametrize(("chosen", "said"), REFUSED.values(), ids=list(REFUSED))
def test_options_that_do_not_fit_are_one_line(one_line_error, requests, tmp_path, chosen, said):
    assert said in one_line_error("batch", requests(request("a")), tmp_path / "out.jsonl", *chosen)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has not all signals")
def test_a_run_with_the_carried_model_survives_all_signals(requests, tmp_path):
    source = requests(*(about(f"row-{number}", f"{QUESTIONS[0]} {number}") for number in range(80)))

    def command(target: str, *more: str) -> list[str]:
        words = ["batch", source, str(tmp_path / target), "--images", str(tmp_path), "--concurrency", "2", *more]
        return [sys.executable, "-m", "tokenpacker", *words]

    def rows_of(target: str) -> int:
        path = tmp_path / target
        return path.read_bytes().count(b"\n") if path.exists() else 0

    for at_least, sent in ((5, signal.SIGINT), (20, signal.SIGTERM), (40, signal.SIGKILL)):
        with subprocess.Popen(command("out.jsonl"), stderr=subprocess.PIPE, text=True) as process:
            while rows_of("out.jsonl") < at_least:
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(sent)
            _, said = process.communicate(timeout=60)
        if sent != signal.SIGKILL:
            assert process.returncode == 75
            assert said.splitlines()[-1] == (
                f"stopped; the rows in {tmp_path / 'out.jsonl'} are kept, and the same command goes on"
            )
    kept = rows_of("out.jsonl")
    assert 40 <= kept < 80
    finished = subprocess.run(command("out.jsonl", "--json"), capture_output=True, text=True, check=True)
    assert json.loads(finished.stdout)["kept"] == kept
    subprocess.run(command("whole.jsonl"), check=True, capture_output=True)
    rows, whole = read(tmp_path / "out.jsonl"), read(tmp_path / "whole.jsonl")
    assert texts(rows) == texts(whole)
    assert [row["id"] for row in rows] == [row["id"] for row in whole]
    assert [row["custom_id"] for row in rows] == [f"row-{number}" for number in range(80)]
