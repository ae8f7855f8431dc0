"""`tokenpacker serve` and `tokenpacker batch`: a model behind the API of OpenAI, and requests to it from a file."""

from __future__ import annotations

import gc
import logging
import os
from contextlib import closing
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument

from tokenpacker.cli import options
from tokenpacker.cli.arguments import exclude, in_range, refuse
from tokenpacker.cli.errors import UNFINISHED, keeping, sigterm_as_ctrl_c
from tokenpacker.cli.loading import load_model
from tokenpacker.cli.model_files import CARRIED, find_model
from tokenpacker.cli.options import flag, number, value
from tokenpacker.cli.output import print_json, print_note, print_result

if TYPE_CHECKING:
    from tokenpacker.batch.batch_rows import OpenAnswer
    from tokenpacker.serve.server import ServeSettings

EngineName = Literal["auto", "vllm", "embedded"]
NEEDED = ("fastapi", "httpx", "prometheus_client", "uvicorn")
LIMITS = "Limits"  # panel of `--help`
ROWS_FAILED = 1  # exit code if a row of the output is an error


def serve(
    vllm_options: Annotated[
        list[str] | None, typer.Argument(metavar="-- VLLM_OPTION", hidden=True)  # its help would not fit the screen
    ] = None,
    model: options.Model = None,
    engine: Annotated[
        Literal["auto", "vllm", "embedded"], value("ENGINE", "vllm, embedded, or auto: vllm with a GPU.")
    ] = "auto",
    host: Annotated[str, value("HOST", "Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, value("P", "0 takes a free one.", callback=in_range(0, 65535))] = 8000,
    api_key_env: Annotated[str | None, value("VAR", "Variable that holds the key.", "no key")] = None,
    allow_urls: Annotated[list[str] | None, value("HOST", "Fetch images from it; repeatable.", "none")] = None,
    scale_factor: options.ScaleFactor = None,
    max_image_tokens: options.MaxImageTokens = None,
    max_batch: Annotated[int | None, number("Answers at once.", "16", LIMITS)] = None,
    max_waiting: Annotated[int | None, number("Questions in the queue.", "64", LIMITS)] = None,
    grace: Annotated[float, value("S", "Seconds to finish after SIGTERM.", panel=LIMITS, callback=in_range(1))] = 30,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Serve a model behind OpenAI's API. Options of vLLM's own server stand behind --.

    Examples:
        tokenpacker serve --port 8001 --allow-urls images.example.com
        tokenpacker serve --model FOLDER --engine vllm -- --tensor-parallel-size 2
    """
    name, why = choose_engine(engine)
    if name == "vllm":
        own = {"--max-batch": max_batch, "--max-waiting": max_waiting, "--device": device, "--dtype": dtype}
        refuse(own, "belongs to --engine embedded; give vLLM's own options behind --")
    elif vllm_options:
        refuse({"VLLM_OPTION": vllm_options[0]}, "belongs to --engine vllm; leave it out")
    for package in NEEDED:
        if find_spec(package) is None:
            raise ImportError(f"serving needs {package}; run: pip install 'tokenpacker[serve]'")
    folder = find_model(model)
    from tokenpacker.serve.limits import Limits
    from tokenpacker.serve.server import ServeSettings, listen

    settings = ServeSettings(
        model=served_name(model),
        engine=name,
        host=host,
        port=port,
        api_key=read_key(api_key_env),
        allowed_hosts=tuple(host.lower() for host in allow_urls or ()),
        scale_factor=scale_factor,
        max_image_tokens=max_image_tokens,
        grace_s=grace,
        limits=Limits() if max_waiting is None else Limits(waiting=max_waiting),
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

        embedded = EmbeddedEngine(*parts, max_batch_size=max_batch or 16, max_waiting=settings.limits.waiting)
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


def _tell(settings: ServeSettings, address: str, why: str, as_json: bool) -> None:
    if as_json:
        print_json({"address": address, "model": settings.model, "engine": settings.engine})
    else:
        typer.echo(f"{settings.model} answers at {address}/v1, engine {settings.engine} ({why}); stop with Ctrl-C")


def batch(
    source: Annotated[Path, Argument(metavar="IN.jsonl", exists=True, dir_okay=False, help="One request a line.")],
    target: Annotated[Path, Argument(metavar="OUT.jsonl", help="Where the answers go, in the order of the input.")],
    model: Annotated[
        str | None, value("MODEL", "Folder, hub id or name. With --endpoint: for rows that name none.", "carried")
    ] = None,
    engine: Annotated[EngineName | None, value("ENGINE", "vllm or embedded.", "vllm with a GPU")] = None,
    images: Annotated[
        Path | None, value("FOLDER", "Start of image paths in requests.", "no paths", exists=True, file_okay=False)
    ] = None,
    allow_urls: Annotated[list[str] | None, value("HOST", "Fetch images from HOST; repeat it.", "none")] = None,
    scale_factor: options.ScaleFactor = None,
    max_image_tokens: options.MaxImageTokens = None,
    concurrency: Annotated[int, number("Requests at a time, of each model.")] = 32,
    overwrite: Annotated[bool, flag("--overwrite", "Start anew if OUT.jsonl exists.")] = False,
    endpoint: Annotated[str | None, value("URL", "Ask this OpenAI-compatible API.", "load a model")] = None,
    api_key_env: Annotated[str | None, value("VAR", "Variable that holds its key.", "no key")] = None,
    ray: Annotated[str | None, value("ADDRESS", "Ray: local, auto or HOST:PORT.", "this process")] = None,
    workers: Annotated[int | None, number("Models on Ray.", "one a GPU, or a machine")] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Answer a file of requests in OpenAI's batch format. Called again, it goes on.

    Exit code 0: all are answered. 1: some rows are errors. 2: it cannot run. 75: stopped; it goes on.

    Examples:
        tokenpacker batch requests.jsonl answers.jsonl --images photos
        tokenpacker batch requests.jsonl out.jsonl --endpoint http://localhost:8000/v1
    """
    exclude({"--endpoint": endpoint, "--ray": ray})
    budget: dict[str, Any] = {"scale_factor": scale_factor, "max_image_tokens": max_image_tokens}
    if ray is None:
        refuse({"--workers": workers}, "needs --ray")
    if endpoint is None:
        refuse({"--api-key-env": api_key_env}, "needs --endpoint")
        load = partial(load_model, _absolute(model), verbose, device, dtype, **budget)
        name = choose_engine(engine or "auto")[0]
        if name == "vllm":
            refuse({"--device": device, "--dtype": dtype}, "belongs to --engine embedded")
        opened, settings = _loaded(name, model, load, allow_urls or [], concurrency)
        model = served_name(model)
    else:
        of_model = {"--engine": engine, "--allow-urls": allow_urls, "--device": device, "--dtype": dtype}
        refuse(of_model, "is for a model that is loaded here; leave it out with --endpoint")
        opened, settings = _asked(endpoint, read_key(api_key_env), concurrency)
    from tokenpacker.batch import run_batch

    with sigterm_as_ctrl_c(), keeping(f"the rows in {target} are kept, and the same command goes on", UNFINISHED):
        summary = run_batch(
            source,
            target,
            opened,
            settings,
            defaults={name: given for name, given in {"model": model, **budget}.items() if given is not None},
            images=images,
            concurrency=concurrency,
            ray=ray,
            workers=workers,
            overwrite=overwrite,
        )
    print_result(as_json, {"output": str(target), **summary.to_dict()}, str(summary))
    if summary.errors:
        raise typer.Exit(ROWS_FAILED)


def _absolute(model: str | None) -> str | None:
    """A folder's path as Ray's workers need it, which run in other folders."""
    return os.path.abspath(model) if model and os.path.isdir(model) else model


def _loaded(
    engine: str, model: str | None, load: partial[Any], hosts: list[str], concurrency: int
) -> tuple[OpenAnswer, dict[str, Any]]:
    """What answers with a model that is loaded here, and its settings."""
    from tokenpacker.batch.local_model import embedded_answer, model_digest

    shared: dict[str, Any] = {"allowed_hosts": tuple(sorted(map(str.lower, hosts))), "concurrency": concurrency}
    settings = {"engine": engine, "dtype": load.args[-1], "hosts": shared["allowed_hosts"]}
    settings["model"] = model_digest(find_model(model))
    if engine == "embedded":
        return partial(embedded_answer, load, model=served_name(model), **shared), settings
    from tokenpacker.batch.vllm_child import vllm_answer

    return partial(vllm_answer, _absolute(model) or CARRIED, verbose=load.args[1], **shared), settings


def _asked(url: str, key: str | None, concurrency: int) -> tuple[OpenAnswer, dict[str, Any]]:
    """What answers through an endpoint, and its settings."""
    try:
        from tokenpacker.batch.endpoint import Endpoint
    except ImportError:
        raise ImportError("--endpoint needs httpx; run: pip install 'tokenpacker[serve]'") from None
    endpoint = Endpoint(url, api_key=key, connections=concurrency)
    return partial(closing, endpoint), {"endpoint": endpoint.url}
