"""The page's server as a process."""

from __future__ import annotations

import logging
import socket
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tokenpacker.ui.chat_page import HERE, ChatPage, theme
from tokenpacker.ui.gate import Gate
from tokenpacker.ui.page_actions import PageActions

if TYPE_CHECKING:
    import uvicorn

GRACE_S = 1  # for open streams of pages at the end
SESSIONS = 256  # that are held at once


def build_app(
    name: str, actions: PageActions, password: str | None = None, hosts: tuple[str, ...] | None = None
) -> Gate:
    """The page of a model behind its gate, as an ASGI app.

    Args:
        name: of the model, as the page shows it.
        password: `user:password`; None lets everybody in.
        hosts: names by which the page may be called beside those of this machine itself; None allows all.
    """
    import fastapi
    import gradio as gr

    blocks = ChatPage(name, actions).blocks
    blocks.queue(max_size=actions.limits.waiting, api_open=False)
    blocks.state_session_capacity = SESSIONS
    app = gr.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        blocks,
        "/",
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        css=(HERE / "stage.css").read_text(encoding="utf-8"),
    )
    return Gate(app, actions.limits, password, hosts, tuple(blocks.fns))


def page_server(app: Gate, host: str, on_ready: Callable[[str], Any] = print) -> uvicorn.Server:
    """A server for the page. `run(sockets=[listener])`, with the listener of `serve.server.listen`, starts it.

    Args:
        host: as it is shown in the address.
        on_ready: gets the page's address once it answers.
    """
    import uvicorn

    class Server(uvicorn.Server):
        """Ends with exit code 0 on the first signal; a second one does not wait for open pages."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started and sockets:
                name = f"[{host}]" if ":" in host else host
                on_ready(f"http://{name}:{sockets[0].getsockname()[1]}")

        def handle_exit(self, sig: int, frame: Any) -> None:
            self.force_exit = self.should_exit
            self.should_exit = True

    warnings.simplefilter("ignore")  # Pillow's are about images of requests
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # open pages are cut off at the end
    settings: dict[str, Any] = {"log_config": None, "access_log": False, "proxy_headers": False, "server_header": False}
    config = uvicorn.Config(app, **settings, ws="none", http="h11", timeout_graceful_shutdown=GRACE_S)
    return Server(config)
