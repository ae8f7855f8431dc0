"""A server on this machine that speaks as much of the hub's protocol as fetching a data set needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

REVISION, OLDER = "a" * 40, "b" * 40


class FakeHub:
    """One data set.

    Attributes:
        files: content by path. Files of `large` have a SHA-256, the others git's checksum.
        card: fields of the data set's card.
        revision: what `main` is.
        damaged: how many more times a file is sent with a wrong byte.
        stuck: files of which half is sent, and no more until `released`.
        requests: how many times each file was fetched.
        gated: whether fetching needs consent.
    """

    def __init__(self, repository: str, files: dict[str, bytes], large: tuple[str, ...] = ()) -> None:
        self.repository, self.files, self.large = repository, files, large
        self.card: dict[str, Any] = {}
        self.revision = REVISION
        self.damaged: Counter[str] = Counter()
        self.stuck: set[str] = set()
        self.released = threading.Event()
        self.reached = threading.Event()
        self.requests: Counter[str] = Counter()
        self.gated = False
        self.address = ""

    def checksum(self, path: str) -> str:
        content = self.files[path]
        if path in self.large:
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()

    def info(self, revision: str) -> dict[str, Any]:
        siblings = []
        for path, content in self.files.items():
            entry: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": self.checksum(path)}
            if path in self.large:
                entry["lfs"] = {"sha256": self.checksum(path), "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        return {"id": self.repository, "sha": revision, "cardData": self.card, "tags": [], "siblings": siblings}

    def tree(self) -> list[dict[str, Any]]:
        entries = []
        for entry in self.info(self.revision)["siblings"]:
            found = {"type": "file", "path": entry["rfilename"], "size": entry["size"], "oid": entry["blobId"]}
            if "lfs" in entry:
                found["lfs"] = {"oid": entry["lfs"]["sha256"], "size": entry["size"], "pointerSize": 134}
            entries.append(found)
        return entries

    @contextmanager
    def serve(self) -> Iterator[FakeHub]:
        """Runs the server within the context; `address` is its endpoint."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                parts = unquote(urlsplit(self.path).path).strip("/").split("/")
                if parts[:2] == ["api", "datasets"]:
                    revision = parts[5] if len(parts) > 5 else hub.revision
                    revision = hub.revision if revision == "main" else revision
                    if "/".join(parts[2:4]) != hub.repository:
                        self.fail(404, "RepoNotFound")
                    elif revision not in (REVISION, OLDER):
                        self.fail(404, "RevisionNotFound")
                    else:
                        content = hub.tree() if parts[4:5] == ["tree"] else hub.info(revision)
                        self.send(json.dumps(content).encode(), body)
                elif "resolve" in parts:
                    self.file("/".join(parts[5:]), parts[4], body)
                else:
                    self.send(b"", body)

            def fail(self, status: int, code: str) -> None:
                self.send(b"", True, status, {"X-Error-Code": code, "X-Error-Message": code})

            def file(self, path: str, revision: str, body: bool) -> None:
                if hub.gated:
                    self.fail(403, "GatedRepo")
                    return
                content = hub.files[path]
                headers = {"X-Repo-Commit": revision, "ETag": f'"{hub.checksum(path)}"'}
                if body:
                    hub.requests[path] += 1
                    if hub.damaged[path]:
                        hub.damaged[path] -= 1
                        content = bytes([content[0] ^ 1]) + content[1:]
                self.send(content, body, 200, headers, path in hub.stuck)

            def send(self, content: bytes, body: bool, status: int = 200, headers: Any = None, stuck=False) -> None:
                self.send_response(status)
                for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if not body:
                    return
                if stuck:
                    self.wfile.write(content[: len(content) // 2])
                    self.wfile.flush()
                    hub.reached.set()
                    hub.released.wait(60)
                    return
                self.wfile.write(content)

            def log_message(self, *arguments: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        self.address = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.released.set()
            server.shutdown()
            server.server_close()


@contextmanager
def endpoint(monkeypatch: Any, address: str) -> Iterator[None]:
    """Within the context, huggingface_hub asks this address, as if the machine had a network."""
    from tokenpacker.hub import hub_problem

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    hub_problem.cache_clear()
    try:
        yield
    finally:
        hub_problem.cache_clear()
