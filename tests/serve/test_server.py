"""The process: its settings, and how it starts and ends."""

from __future__ import annotations

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import httpx
import pytest
from PIL import Image

from fake_engine import FakeEngine, question
from tokenpacker.serve.refusals import LONGEST_WAIT_S
from tokenpacker.serve.server import ServeSettings, listen, run

CHAT = "/v1/chat/completions"
PROGRAM = """
    import sys
    from fake_engine import FakeEngine
    from tokenpacker.serve.server import ServeSettings, run
    engine = FakeEngine()
    settings = ServeSettings(model="tiny", port=0, grace_s=float(sys.argv[1]))
    run(engine, settings, on_ready=lambda address: print(address, flush=True))
    assert engine.closed
    print("ended", flush=True)
"""


class Process:
    """A server in a process of its own."""

    def __init__(self, grace_s: float):
        path = os.pathsep.join(sys.path)
        code = textwrap.dedent(PROGRAM)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(grace_s)],
            env=os.environ | {"PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        self.client = httpx.Client(base_url=self.address, timeout=30)

    def end(self, sign: int) -> None:
        self.process.send_signal(sign)

    def wait(self, timeout: float) -> tuple[int, str]:
        out, _ = self.process.communicate(timeout=timeout)
        return self.process.returncode, out.strip()


@pytest.fixture
def start():
    started = []

    def begin(grace_s: float) -> Process:
        started.append(Process(grace_s))
        return started[-1]

    yield begin
    for server in started:
        server.process.kill()
        server.process.communicate()


def wait_for(client: httpx.Client, line: str) -> None:
    end = time.monotonic() + 10
    while line not in client.get("/metrics").text:
        assert time.monotonic() < end
        time.sleep(0.02)


def refused_until_the_port_is_closed(address: str) -> None:
    for _ in range(200):
        assert httpx.post(address + CHAT, json=question("no")).status_code == 503
        time.sleep(0.02)


def test_headers_are_limited_whatever_is_installed_and_idle_connections_outlive_the_wait_that_a_client_is_told(
    monkeypatch,
):
    """uvicorn prefers httptools, which has no limit."""
    seen = []
    monkeypatch.setattr("tokenpacker.serve.server._server", lambda config, *_: seen.append(config) or mock.Mock())
    settings = ServeSettings(model="tiny", port=0)
    with listen(settings) as listener:
        run(FakeEngine(), settings, listener)
    assert seen[0].http == "h11"
    assert seen[0].timeout_keep_alive > LONGEST_WAIT_S  # a client that was told to wait may use its connection again


def test_an_image_with_damaged_metadata_leaves_no_path_in_the_log(start):
    server = start(20)
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\0")
    address = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    assert server.client.post(CHAT, json=question("what is it?", address)).status_code == 200
    server.process.kill()
    assert server.wait(5)[1] == ""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM for another process")
class TestSignals:
    @pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
    def test_running_requests_finish_new_ones_are_refused_and_the_exit_code_is_0(self, start, sign):
        server = start(20)
        with (
            ThreadPoolExecutor(1) as pool,
            server.client.stream("POST", CHAT, json=question("a " * 20 + "SLOW b", stream=True)) as response,
        ):
            lines = response.iter_lines()
            next(lines)
            whole = pool.submit(httpx.post, server.address + CHAT, json=question("SLOW c"), timeout=30)
            wait_for(httpx.Client(base_url=server.address), "tokenpacker_running 2.0")
            server.end(sign)
            with pytest.raises(httpx.TransportError):
                refused_until_the_port_is_closed(server.address)
            assert list(lines)[-2] == "data: [DONE]"
            assert whole.result().json()["choices"][0]["message"]["content"] == "SLOW c"
        assert server.wait(5) == (0, "ended")

    def test_what_takes_longer_than_the_grace_time_is_told_so_and_the_exit_code_is_0(self, start):
        server = start(4)
        with ThreadPoolExecutor(1) as pool:
            late = pool.submit(server.client.post, CHAT, json=question("WAIT"))
            wait_for(httpx.Client(base_url=server.address), "tokenpacker_running 1.0")
            server.end(signal.SIGTERM)
            assert late.result().status_code == 503
            assert late.result().json()["error"]["code"] == "shutting_down"
        assert server.wait(5) == (0, "ended")

    def test_a_body_that_never_ends_does_not_keep_the_server(self, start):
        server = start(2)
        with socket.create_connection(("127.0.0.1", server.client.base_url.port), timeout=10) as slow:
            slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
            slow.sendall(b"Content-Length: 99\r\n\r\n{")
            time.sleep(0.3)
            server.end(signal.SIGTERM)
            assert slow.recv(1000).startswith(b"HTTP/1.1 503 ")
            code, said = server.wait(5)
        assert code == 0
        assert "Traceback" not in said

    def test_a_client_that_does_not_read_does_not_keep_the_server(self, start):
        server = start(2)
        with server.client.stream("POST", CHAT, json=question("a " * 90_000, stream=True)) as response:
            next(response.iter_raw())
            time.sleep(1)
            server.end(signal.SIGTERM)
            code, said = server.wait(5)
        assert code == 0
        assert "Traceback" not in said

    def test_a_second_signal_ends_at_once(self, start):
        server = start(60)
        with ThreadPoolExecutor(1) as pool:
            lost = pool.submit(server.client.post, CHAT, json=question("WAIT"))
            wait_for(httpx.Client(base_url=server.address), "tokenpacker_running 1.0")
            for _ in range(2):
                server.end(signal.SIGTERM)
                time.sleep(0.3)
            with pytest.raises(httpx.TransportError):
                lost.result()
        assert server.wait(5) == (128 + signal.SIGTERM, "")

    def test_after_kill_9_clients_see_an_error_and_never_half_an_answer(self, start):
        server = start(60)
        with ThreadPoolExecutor(1) as pool:
            lost = pool.submit(server.client.post, CHAT, json=question("a b WAIT"))
            with server.client.stream("POST", CHAT, json=question("a WAIT", stream=True)) as response:
                lines = response.iter_lines()
                next(lines)
                wait_for(httpx.Client(base_url=server.address), "tokenpacker_running 2.0")
                server.end(signal.SIGKILL)
                with pytest.raises(httpx.TransportError):
                    list(lines)
            with pytest.raises(httpx.TransportError):
                lost.result()
        assert start(5).client.post(CHAT, json=question("a b")).status_code == 200


def test_a_taken_port_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} of host 127.0.0.1 cannot be taken .*choose another --port"):
            listen(ServeSettings(model="m", port=port))
    with pytest.raises(ValueError, match=r"host nowhere\.invalid cannot be taken"):
        listen(ServeSettings(model="m", host="nowhere.invalid"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"api_key": " "}, "the API key is empty"),
        ({"port": 70000}, "port 70000 does not exist"),
        ({"grace_s": 0}, "grace_s=0 must be positive"),
        ({"allowed_hosts": ("https://a.example",)}, "'https://a.example' is no name of a host"),
        ({"allowed_hosts": ("*.example",)}, "is no name of a host"),
        ({"allowed_hosts": ("a.example.",)}, "is no name of a host"),
        ({"host_names": ("a.example:80",)}, "is no name of a host"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        ServeSettings(model="m", **settings)


def test_only_this_machine_can_connect_by_default():
    assert ServeSettings(model="m").is_loopback
    assert ServeSettings(model="m", host="localhost").is_loopback
    assert ServeSettings(model="m", host="::1").is_loopback
    assert not ServeSettings(model="m", host="0.0.0.0").is_loopback


def test_names_of_hosts_are_checked_on_this_machine_and_where_some_are_given():
    assert ServeSettings(model="m", host="127.0.0.2").names == ("127.0.0.2",)
    assert ServeSettings(model="m", host_names=("a.example",)).names == ("127.0.0.1", "a.example")
    assert ServeSettings(model="m", host="0.0.0.0").names is None
    assert ServeSettings(model="m", host="0.0.0.0", host_names=("a.example",)).names == ("0.0.0.0", "a.example")
