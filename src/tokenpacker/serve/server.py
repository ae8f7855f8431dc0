"""The server as a process: its settings, its address, and how it starts and ends."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address

from tokenpacker.serve.chat_requests import ChatRules

DEFAULT_PORT = 8000


@dataclass(frozen=True, kw_only=True)
class ServeSettings(ChatRules):
    """What a server offers and allows, whatever its engine.

    Args:
        model: the name that requests give.
        engine: the engine's name, for messages.
        host: address or name to listen on.
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
        for host in self.allowed_hosts:
            if host != host.lower() or not host or set(host) & set("/:@*?# "):
                raise ValueError(f"{host!r} is no name of a host; write it as in images.example.com, one by one")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
