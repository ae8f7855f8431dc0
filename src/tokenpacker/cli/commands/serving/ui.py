"""`tokenpacker ui`: a page to try a model on."""

from __future__ import annotations

import gc
import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from tokenpacker.cli import options
from tokenpacker.cli.arguments import in_range, refuse, require_free
from tokenpacker.cli.commands.serving.serve import served_name
from tokenpacker.cli.errors import keeping, sigterm_as_ctrl_c
from tokenpacker.cli.loading import load_model, quiet_exporters
from tokenpacker.cli.model_files import CARRIED, find_model
from tokenpacker.cli.options import flag, number, value
from tokenpacker.cli.output import print_note, print_result
from tokenpacker.places import check_apart

HOST, PORT = "127.0.0.1", 7860


def ui(
    model: options.Model = None,
    host: Annotated[str, value("HOST", "Address to listen on.")] = HOST,
    port: Annotated[int, value("P", "0 takes a free one.", callback=in_range(0, 65535))] = PORT,
    allow_host: options.AllowHost = None,
    auth_env: Annotated[str | None, value("VAR", "Variable that holds user:password.", "no password")] = None,
    static: Annotated[Path | None, value("DIR", "Write a page that needs no server, and leave.", "none")] = None,
    overwrite: Annotated[bool, flag("--overwrite", "Replace DIR, once the new page is complete.")] = False,
    max_batch: Annotated[int | None, number("Answers at once.", "16")] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Open a page to ask a model, with its tokens under a slider.

    Examples:
        tokenpacker ui
        tokenpacker ui --model tiny-regions --port 7861
        tokenpacker ui --static site
    """
    if static is not None:
        own: dict[str, Any] = {"--allow-host": allow_host, "--auth-env": auth_env, "--max-batch": max_batch}
        own |= {"--device": device, "--dtype": dtype}
        own |= {"--host": host if host != HOST else None, "--port": port if port != PORT else None}
        refuse(own, "belongs to the page with a server; leave it out with --static")
        _write_static(model, static, overwrite, as_json, verbose)
        return
    refuse({"--overwrite": overwrite}, "belongs to --static")
    for package in ("gradio", "uvicorn"):
        if find_spec(package) is None:
            raise ImportError(f"the page needs {package}; run: pip install 'tokenpacker[ui]'")
    find_model(model)
    from tokenpacker.serve.server import ServeSettings, listen

    names = tuple(name.lower() for name in allow_host or ())
    settings = ServeSettings(model=served_name(model), host=host, host_names=names, port=port)
    password = _read_password(auth_env)
    if password is None and not settings.is_loopback:
        print_note(f"warning: {host} is open to other machines and there is no password; set one with --auth-env")
    with listen(settings) as listener:  # a port that is taken is told before a model is loaded
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
        print_note(f"loading {settings.model}")
        loaded, processor = load_model(model, verbose, device, dtype)
        from tokenpacker.serve.embedded import EmbeddedEngine
        from tokenpacker.ui.page_actions import PageActions
        from tokenpacker.ui.page_server import build_app, page_server

        engine = EmbeddedEngine(loaded, processor, max_batch_size=max_batch or 16, max_waiting=settings.limits.waiting)
        actions = PageActions(engine=engine, model=loaded, processor=processor, limits=settings.limits)
        try:
            page = build_app(settings.model, actions, password, settings.names)
            page_server(page, host, lambda address: _tell(settings.model, address, as_json)).run(sockets=[listener])
        finally:
            engine.close(0)
            gc.freeze()  # Python would search the model's modules for garbage at its end, for seconds


def _write_static(model: str | None, folder: Path, overwrite: bool, as_json: bool, verbose: bool) -> None:
    require_free(folder, overwrite, model or CARRIED)
    source = find_model(model)
    check_apart(folder, [source])  # a model from the hub or of this package has another name than its folder
    from tokenpacker.export.exporting import require_packages
    from tokenpacker.ui.static_page import write_static_page

    require_packages("onnx", None)
    parts = load_model(model, verbose)
    kept = keeping(f"nothing is kept, for {folder} appears when it is complete; call it again to start anew")
    with kept, sigterm_as_ctrl_c(), quiet_exporters(verbose):
        write_static_page(
            *parts, folder, name=served_name(model), overwrite=overwrite, sources=[source], progress=print_note
        )
    said = f"{folder} holds the page; serve it with: python -m http.server -d {folder}"
    print_result(as_json, {"model": served_name(model), "folder": str(folder)}, said)


def _read_password(variable: str | None) -> str | None:
    """`user:password` in an environment variable. Raises ValueError if it is not there."""
    if variable is None:
        return None
    password = os.environ.get(variable, "").strip()
    user, colon, secret = password.partition(":")
    if not (user and colon and secret):
        raise ValueError(f"--auth-env {variable}: the variable does not hold user:password; set it first")
    return password


def _tell(name: str, address: str, as_json: bool) -> None:
    said = f"{name} has its page at {address}; stop with Ctrl-C"
    print_result(as_json, {"model": name, "address": address}, said)
