"""vLLM as what answers rows: `tokenpacker serve --engine vllm` as a child, which ends with this process."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import httpx

from tokenpacker.batch.batch_rows import Answer
from tokenpacker.batch.endpoint import Endpoint

KEY, HOST = "TOKENPACKER_BATCH_KEY", "127.0.0.1"
POLL_SECONDS = 0.5
# Starts a program and ends it when standard input closes, which the system does when our process is killed. Ray kills
# the children of its workers, this one too; then Linux ends the program, by the signal that prctl asks for.
WATCH = """
import ctypes, signal, subprocess, sys, threading, time
def end_with_parent():
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
on_linux = {"preexec_fn": end_with_parent} if sys.platform == "linux" else {}
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, **on_linux)
def end():
    sys.stdin.read()
    child.terminate()
    time.sleep(30)
    child.kill()
threading.Thread(target=end, daemon=True).start()
while True:
    try:
        sys.exit(child.wait())
    except KeyboardInterrupt:  # the child gets Ctrl-C too
        pass
"""


@contextmanager
def vllm_answer(
    model: str, *, allowed_hosts: tuple[str, ...] = (), concurrency: int = 32, verbose: bool = False
) -> Iterator[Answer]:
    """A context with vLLM's server on a port of this machine, open to this process alone.

    Args:
        model: as for `--model`.
        allowed_hosts: hosts that images may be fetched from.
        concurrency: most calls at a time.
        verbose: shows all that vLLM says.

    Raises:
        ChildProcessError: if the server ends before it answers.
    """
    with closing(socket.socket()) as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    key = secrets.token_urlsafe()
    command = [sys.executable, "-c", WATCH, sys.executable, *_arguments(model, port, allowed_hosts)]
    environment = {"VLLM_LOGGING_LEVEL": "INFO" if verbose else "WARNING", **os.environ, KEY: key}
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=sys.stderr.fileno(), env=environment) as child,
        closing(Endpoint(f"http://{HOST}:{port}", api_key=key, connections=concurrency, note=_note)) as endpoint,
    ):
        assert child.stdin is not None
        try:
            _wait(child, f"http://{HOST}:{port}/health")
            yield endpoint
        finally:
            child.stdin.close()


def _arguments(model: str, port: int, hosts: tuple[str, ...]) -> list[str]:
    serve = ["-m", "tokenpacker", "serve", "--engine", "vllm", "--model", model, "--port", str(port)]
    return [*serve, "--api-key-env", KEY, *(word for host in hosts for word in ("--allow-urls", host))]


def _note(said: str) -> None:
    print(said, file=sys.stderr, flush=True)


def _wait(child: subprocess.Popen[bytes], health: str) -> None:
    while child.poll() is None:
        try:
            if httpx.get(health, trust_env=False).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(POLL_SECONDS)
    raise ChildProcessError(f"vLLM ended with code {child.returncode} before it was ready; its own words stand above")
