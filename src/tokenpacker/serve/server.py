"""The server as a process: its settings, its address, and how it starts and ends."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from threading import Timer
from typing import TYPE_CHECKING, Any

from tokenpacker.serve.chat_requests import ChatRules
from tokenpacker.serve.http_bodies import is_loopback
from tokenpacker.serve.questions import Engine

if TYPE_CHECKING:
    import uvicorn

logger = logging.getLogger(__name__)

DEFAULT_PORT = 8000
KEEP_ALIVE_S = 150  # of an idle connection; longer than any Retry-After, after which clients use it again
SENDING_S = 2.0  # part of the grace time for sending answers; at most half of it


@dataclass(frozen=True, kw_only=True)
class ServeSettings(ChatRules):
    """What a server offers and allows, whatever its engine.

    Args:
        model: the name that requests give.
        engine: the engine's name, for messages.
        host: address or name to listen on.
        host_names: further names by which clients may call the server.
        port: 0 takes a free one.
        api_key: what clients must send as `Authorization: Bearer KEY`; None lets everybody in.
        grace_s: seconds from the signal to end until the process has ended.

    Raises:
        ValueError: for an empty key, a port that does not exist, a host with a scheme or a path, and a grace time that
            is not positive.
    """

    model: str
    engine: str = "embedded"
    host: str = "127.0.0.1"
    host_names: tuple[str, ...] = ()
    port: int = DEFAULT_PORT
    api_key: str | None = None
    grace_s: float = 30.0

    def __post_init__(self) -> None:
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("the API key is empty; set one, or serve without")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port {self.port} does not exist; use 1 to 65535, or 0 for a free one")
        if self.grace_s <= 0:
            raise ValueError(f"grace_s={self.grace_s} must be positive; requests that run need time to finish")
        for host in (*self.allowed_hosts, *self.host_names):
            if host != host.lower() or not host or host.endswith(".") or set(host) & set("/:@*?# "):
                raise ValueError(f"{host!r} is no name of a host; write it as in images.example.com, one by one")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        return is_loopback(self.host)

    @property
    def names(self) -> tuple[str, ...] | None:
        """Names by which clients may call the server, beside those of this machine itself; None allows all."""
        return (self.host.lower(), *self.host_names) if self.is_loopback or self.host_names else None


def listen(settings: ServeSettings) -> socket.socket:
    """The socket of a server, before a model is loaded. Raises ValueError if the address cannot be taken."""
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=1)
    except OSError as error:
        reason = error.strerror or str(error)
        where = f"port {settings.port} of host {settings.host}"
        raise ValueError(f"{where} cannot be taken ({reason}); choose another --port, or another --host") from None


def run(
    engine: Engine,
    settings: ServeSettings,
    listener: socket.socket | None = None,
    on_ready: Callable[[str], Any] = print,
) -> None:
    """Serves until a signal ends it. Then running requests finish, and new ones are refused. A second one ends at once.

    Args:
        listener: from `listen`, which is called if there is none.
        on_ready: gets the server's address once it answers.

    Raises:
        ValueError: if the address cannot be taken.
    """
    import uvicorn

    from tokenpacker.serve.http_app import build_app

    listener = listener or listen(settings)
    app = build_app(engine, settings)
    warnings.simplefilter("ignore")  # Pillow's are about images of requests, and name paths
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        lifespan="off",
        ws="none",
        http="h11",  # httptools, if it is there, has no limit for headers
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=(_answering_s(settings) + settings.grace_s) / 2,  # type: ignore[arg-type]
    )
    host, port = listener.getsockname()[:2]
    name = f"[{host}]" if ":" in host else host
    server = _server(config, engine, settings, lambda: on_ready(f"http://{name}:{port}"))
    server.run(sockets=[listener])
    app.state.service.pool.shutdown(wait=False, cancel_futures=True)


def _answering_s(settings: ServeSettings) -> float:
    """Seconds of the grace time for making answers. Halfway between then and its end, requests are given up."""
    return max(settings.grace_s - SENDING_S, settings.grace_s / 2)


def _server(
    config: uvicorn.Config, engine: Engine, settings: ServeSettings, on_ready: Callable[[], Any]
) -> uvicorn.Server:
    import uvicorn

    service = config.app.state.service  # type: ignore[union-attr]

    class Server(uvicorn.Server):
        """Ends with exit code 0 on the first signal, and leaves the engine the grace time."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            on_ready()

        def handle_exit(self, sig: int, frame: Any) -> None:
            if service.draining:
                os._exit(128 + sig)
            service.draining = self.should_exit = True
            logger.info("ending: requests have %g s to finish; a second signal ends at once", settings.grace_s)
            watchdog = Timer(settings.grace_s, os._exit, (1,))  # a thread may hang, such as in a look-up of a name
            watchdog.daemon = True
            watchdog.start()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            closing = asyncio.create_task(self.close_engine(time.monotonic() + _answering_s(settings)))
            await super().shutdown(sockets)
            await closing

        async def close_engine(self, deadline: float) -> None:
            while service.preparing and time.monotonic() < deadline:
                await asyncio.sleep(0.02)
            await asyncio.to_thread(engine.close, max(0.0, deadline - time.monotonic()))

    return Server(config)
