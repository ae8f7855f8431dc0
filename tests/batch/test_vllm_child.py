"""The child is another program here; tests/plugins has vLLM itself."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from tokenpacker.batch import vllm_child
from tokenpacker.batch.vllm_child import KEY, WATCH, vllm_answer

SERVER = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({"path": self.path})

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({"knows": self.headers["Authorization"] == "Bearer " + os.environ[sys.argv[2]]})

    def answer(self, content):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_the_child_answers_the_one_who_has_its_key(monkeypatch):
    monkeypatch.setattr(vllm_child, "_arguments", lambda model, port, hosts: ["-c", SERVER, str(port), KEY])
    with vllm_answer("model") as answer:
        assert answer({"messages": []}).body == {"knows": True}


def test_a_child_that_cannot_start_is_told(monkeypatch):
    monkeypatch.setattr(vllm_child, "_arguments", lambda model, port, hosts: ["-c", "import sys; sys.exit(3)"])
    with pytest.raises(ChildProcessError, match="ended with code 3 before it was ready"), vllm_answer("model"):
        pass


def test_the_arguments_are_those_of_serve():
    words = vllm_child._arguments("folder", 1234, ("a.example.com", "b.example.com"))
    assert words[:5] == ["-m", "tokenpacker", "serve", "--engine", "vllm"]
    assert words[-4:] == ["--allow-urls", "a.example.com", "--allow-urls", "b.example.com"]


def test_the_child_ends_when_its_parent_is_gone():
    sleeper = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
    command = [sys.executable, "-c", WATCH, *sleeper]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline().strip() == b"up"
        process.stdin.close()  # as the system does for a killed parent
        assert process.wait(timeout=20) != 0
        assert process.stdout.read() == b""  # the sleeper closed it too


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no signal for the end of a parent")
def test_the_child_ends_when_its_watch_is_killed_as_ray_does():
    sleeper = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
    command = [sys.executable, "-c", WATCH, *sleeper]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline().strip() == b"up"
        process.kill()
        start = time.monotonic()
        assert process.stdout.read() == b""  # at the end of the sleeper, which has it open too
        assert time.monotonic() - start < 20
