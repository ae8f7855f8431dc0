"""`tokenpacker serve`: a model behind the API of OpenAI."""

from __future__ import annotations

import gc
import logging
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from tokenpacker.cli import options
from tokenpacker.cli.arguments import in_range, refuse
from tokenpacker.cli.loading import load_model
from tokenpacker.cli.model_files import CARRIED, find_model
from tokenpacker.cli.options import number, value
from tokenpacker.cli.output import print_json, print_note

if TYPE_CHECKING:
    from tokenpacker.serve.limits import Limits
    from tokenpacker.serve.server import ServeSettings

EngineName = Literal["auto", "vllm", "embedded"]
NEEDED = ("fastapi", "httpx", "prometheus_client", "uvicorn")


def serve(
    vllm_options: Annotated[
        list[str] | None, typer.Argument(metavar="-- VLLM_OPTION", hidden=True)  # its help would not fit the screen
    ] = None,
    model: options.Model = None,
    engine: Annotated[EngineName, value("ENGINE", "vllm, embedded, or auto: vllm with a GPU.")] = "auto",
    host: Annotated[str, value("HOST", "Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, value("P", "0 takes a free one.", callback=in_range(0, 65535))] = 8000,
    api_key_env: Annotated[str | None, value("VAR", "Variable that holds the key.", "no key")] = None,
    allow_host: options.AllowHost = None,
    allow_urls: Annotated[list[str] | None, value("HOST", "Fetch images from it; repeatable.", "none")] = None,
    scale_factor: options.AutoScaleFactor = None,
    max_image_tokens: options.MaxImageTokens = None,
    max_batch: Annotated[int | None, number("Answers at once.", "16")] = None,
    max_waiting: Annotated[int | None, number("Questions in the queue.", "64")] = None,
    max_new_tokens: Annotated[int | None, number("Longest answer in tokens.", "512")] = None,
    cache: Annotated[
        int | None, number("Memory for packed tokens; 0 keeps none.", "256", metavar="MIB", least=0)
    ] = None,
    grace: Annotated[float, value("S", "Seconds to finish after SIGTERM.", callback=in_range(1))] = 30,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Serve a model by OpenAI's API; options of vLLM stand behind --.

    Examples:
        tokenpacker serve --port 8001 --allow-urls images.example.com
        tokenpacker serve --model FOLDER --engine vllm -- --tensor-parallel-size 2
    """
    name, why = choose_engine(engine)
    if name == "vllm":
        own: dict[str, Any] = {
            "--max-batch": max_batch,
            "--max-waiting": max_waiting,
            "--max-new-tokens": max_new_tokens,
        }
        own |= {"--cache": cache, "--device": device, "--dtype": dtype}
        refuse(own, "belongs to --engine embedded; give vLLM's own options behind --")
    elif vllm_options:
        refuse({"VLLM_OPTION": vllm_options[0]}, "belongs to --engine vllm; leave it out")
    for package in NEEDED:
        if find_spec(package) is None:
            raise ImportError(f"serving needs {package}; run: pip install 'tokenpacker[serve]'")
    if name == "embedded":  # torch's threads would spin while they wait, and take time from those that prepare requests
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # is read when torch is imported
    folder = find_model(model)
    from tokenpacker.serve.server import ServeSettings, listen

    settings = ServeSettings(
        model=served_name(model),
        engine=name,
        host=host,
        host_names=tuple(host.lower() for host in allow_host or ()),
        port=port,
        api_key=read_key(api_key_env),
        allowed_hosts=tuple(host.lower() for host in allow_urls or ()),
        scale_factor=cast(Any, scale_factor),
        max_image_tokens=max_image_tokens,
        grace_s=grace,
        limits=_limits(max_waiting, max_new_tokens),
    )
    if settings.api_key is None and not settings.is_loopback:
        print_note(f"warning: {host} is open to other machines and there is no key; set one with --api-key-env")
    with listen(settings) as listener:  # a port that is taken is told before a model is loaded
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
        logging.getLogger("tokenpacker").setLevel(logging.DEBUG if verbose else logging.INFO)
        if name == "vllm":
            from tokenpacker.serve.vllm_server import run_vllm_server

            listener.close()
            run_vllm_server(settings, folder, vllm_options or ())
            return
        print_note(f"loading {settings.model}")
        parts = load_model(model, verbose, device, dtype, scale_factor=scale_factor, max_image_tokens=max_image_tokens)
        from tokenpacker.serve.embedded import EmbeddedEngine
        from tokenpacker.serve.server import run

        embedded = EmbeddedEngine(
            *parts,
            max_batch_size=max_batch or 16,
            max_waiting=settings.limits.waiting,
            max_new_tokens=max_new_tokens or 512,
            cache_bytes=(256 if cache is None else cache) * 2**20,
        )
        run(embedded, settings, listener, lambda address: _tell(settings, address, why, as_json))
        gc.freeze()  # Python would search the model's modules for garbage at its end, for seconds of the grace time


def choose_engine(asked: str) -> tuple[str, str]:
    """The engine, and why. Raises ImportError for vLLM where it is not installed."""
    is_there = find_spec("vllm") is not None
    if asked == "vllm" and not is_there:
        raise ImportError("--engine vllm needs vLLM; run: pip install vllm, in an environment of its own")
    if asked != "auto":
        return asked, "as asked"
    if not is_there:
        return "embedded", "vLLM is not installed"
    import torch

    return ("vllm", "it is installed and there is a GPU") if torch.cuda.is_available() else ("embedded", "no GPU")


def served_name(model: str | None) -> str:
    """The name that requests give: of a folder the last part of its path, which is nobody else's business."""
    return os.path.basename(os.path.abspath(model)) if model and os.path.isdir(model) else model or CARRIED


def read_key(variable: str | None) -> str | None:
    """The key in an environment variable. Raises ValueError if there is none."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"--api-key-env {variable}: the variable is not set; put the key in it first")
    return key


def _limits(waiting: int | None, longest_answer: int | None) -> Limits:
    """The limits of requests, which may ask for the longest answer that the engine gives."""
    from tokenpacker.serve.limits import Limits

    usual = Limits()
    return Limits(waiting=waiting or usual.waiting, max_tokens=max(longest_answer or 1, usual.max_tokens))


def _tell(settings: ServeSettings, address: str, why: str, as_json: bool) -> None:
    if as_json:
        print_json({"address": address, "model": settings.model, "engine": settings.engine})
    else:
        typer.echo(f"{settings.model} answers at {address}/v1, engine {settings.engine} ({why}); stop with Ctrl-C")
