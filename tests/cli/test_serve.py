from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest


def test_what_is_wrong_is_told_before_a_model_is_loaded(one_line_error, monkeypatch):
    monkeypatch.setattr(
        "tokenpacker.cli.commands.serving.serve.load_model", lambda *_, **__: pytest.fail("it was loaded")
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert one_line_error("serve", "--port", port).startswith(f"port {port} of host 127.0.0.1 cannot be taken (")
    assert one_line_error("serve", "--api-key-env", "NO_SUCH_KEY").startswith("--api-key-env NO_SUCH_KEY: the variable")
    assert "is no name of a host" in one_line_error("serve", "--allow-urls", "https://a.example/")
    assert "is no name of a host" in one_line_error("serve", "--allow-host", "a.example:80")
    assert one_line_error("serve", "--port", 70000) == "--port 70000 must lie between 0 and 65535"
    assert one_line_error("serve", "--grace", 0) == "--grace 0.0 must be at least 1"
    assert one_line_error("serve", "--model", "no/such").startswith("model no/such")


def test_a_missing_package_names_the_extra(one_line_error, monkeypatch):
    monkeypatch.setattr(
        "tokenpacker.cli.commands.serving.serve.find_spec", lambda name: None if name == "uvicorn" else name
    )
    error = one_line_error("serve", "--engine", "embedded")
    assert error == "serving needs uvicorn; run: pip install 'tokenpacker[serve]'"
    monkeypatch.setattr("tokenpacker.cli.commands.serving.serve.find_spec", lambda name: None)
    assert one_line_error("serve", "--engine", "vllm").startswith("--engine vllm needs vLLM; run: pip install vllm")


@pytest.mark.parametrize(
    ("option", "value"), [("--max-batch", 4), ("--max-waiting", 4), ("--max-new-tokens", 4), ("--cache", 0)]
)
def test_an_option_of_the_other_engine_is_refused(one_line_error, monkeypatch, option, value):
    monkeypatch.setattr("tokenpacker.cli.commands.serving.serve.find_spec", lambda name: name)
    error = one_line_error("serve", "--engine", "vllm", option, value)
    assert error.startswith(f"{option} belongs to --engine embedded")


@pytest.mark.parametrize(
    ("given", "longest", "cache_bytes", "most_asked"),
    [((), 512, 2**28, 4096), (("--cache", 0, "--max-new-tokens", 9000), 9000, 0, 9000)],
)
def test_the_engine_gets_the_longest_answer_and_the_size_of_its_cache(
    run, monkeypatch, given, longest, cache_bytes, most_asked
):
    made = {}
    monkeypatch.setattr("tokenpacker.cli.commands.serving.serve.load_model", lambda *_, **__: (None, None))
    monkeypatch.setattr("tokenpacker.serve.embedded.EmbeddedEngine", lambda *_, **limits: made.update(limits))
    monkeypatch.setattr("tokenpacker.serve.server.run", lambda _, settings, *__: made.update(settings=settings))
    monkeypatch.setattr("gc.freeze", lambda: None)
    run("serve", "--engine", "embedded", "--port", 0, *given)
    assert (made["max_new_tokens"], made["cache_bytes"]) == (longest, cache_bytes)
    assert made["settings"].limits.max_tokens == most_asked


def test_further_options_reach_vllm_unless_they_are_ours(one_line_error, run, monkeypatch):
    commands = []
    monkeypatch.setattr("tokenpacker.cli.commands.serving.serve.find_spec", lambda name: name)
    monkeypatch.setattr("os.execve", lambda program, command, environment: commands.append(command))
    vllm = ("serve", "--engine", "vllm", "--port", 0, "--")
    run(*vllm, "--tensor-parallel-size", 2, "--enable-lora")
    assert commands[0][-3:] == ["--tensor-parallel-size", "2", "--enable-lora"]
    for ours in ("--port=1", "--middle", "--host"):
        assert "is set by tokenpacker serve" in one_line_error(*vllm, ours, "x")
    assert len(commands) == 1
    assert "belongs to --engine vllm" in one_line_error("serve", "--engine", "embedded", "--", "--enable-lora")


def test_the_engine_is_chosen_by_what_is_there(monkeypatch):
    from tokenpacker.cli.commands.serving.serve import choose_engine, served_name

    monkeypatch.setattr("tokenpacker.cli.commands.serving.serve.find_spec", lambda name: name)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert choose_engine("auto") == ("vllm", "it is installed and there is a GPU")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert choose_engine("auto") == ("embedded", "no GPU")
    monkeypatch.setattr("tokenpacker.cli.commands.serving.serve.find_spec", lambda name: None)
    assert choose_engine("auto") == ("embedded", "vLLM is not installed")
    assert served_name(None) == "tiny"
    assert served_name("someone/model") == "someone/model"


def test_a_server_that_others_can_reach_without_a_key_is_warned_of(run, monkeypatch):
    monkeypatch.setattr("tokenpacker.cli.commands.serving.serve.load_model", lambda *_, **__: 1 / 0)
    assert "0.0.0.0 is open to other machines and there is no key" in run("serve", "--host", "0.0.0.0").stderr
    monkeypatch.setenv("KEY", "secret")
    assert "secret" not in (said := run("serve", "--host", "0.0.0.0", "--api-key-env", "KEY").stderr)
    assert "no key" not in said


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM for another process")
def test_the_command_serves_the_carried_model_until_it_is_told_to_end(tiny_model_dir):
    command = [sys.executable, "-m", "tokenpacker", "serve", "--model", tiny_model_dir, "--port", "0", "--json"]
    keyed = [*command, "--api-key-env", "KEY", "--engine", "embedded"]
    environment = os.environ | {"KEY": "secret", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(keyed, env=environment, stdout=-1, stderr=-1, text=True)
    assert process.stdout is not None
    try:
        ready = json.loads(process.stdout.readline())
        assert ready["model"] == tiny_model_dir.name
        url = f"{ready['address']}/v1/chat/completions"
        body = {"model": ready["model"], "messages": [{"role": "user", "content": "the prompt"}], "max_tokens": 3}
        assert httpx.post(url, json=body).status_code == 401
        key = {"authorization": "Bearer secret"}
        assert httpx.post(url, json=body, headers=key).json()["usage"]["completion_tokens"] <= 3
        process.send_signal(signal.SIGTERM)
        out, said = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out) == (0, "")
    assert "POST /v1/chat/completions 200" in said
    for hidden in ("the prompt", "secret", str(tiny_model_dir), "Traceback"):
        assert hidden not in said
