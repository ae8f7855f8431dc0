"""`tokenpacker batch`: requests to a model from a file."""

from __future__ import annotations

import os
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument

from tokenpacker.cli import options
from tokenpacker.cli.arguments import exclude, refuse
from tokenpacker.cli.commands.serving.serve import EngineName, choose_engine, read_key, served_name
from tokenpacker.cli.errors import UNFINISHED, keeping, sigterm_as_ctrl_c
from tokenpacker.cli.loading import load_model
from tokenpacker.cli.model_files import CARRIED, find_model
from tokenpacker.cli.options import flag, number, value
from tokenpacker.cli.output import print_note, print_result

if TYPE_CHECKING:
    from tokenpacker.batch.batch_rows import OpenAnswer

ROWS_FAILED = 1  # exit code if a row of the output is an error


def batch(
    source: Annotated[Path, Argument(metavar="IN.jsonl", exists=True, dir_okay=False, help="One request a line.")],
    target: Annotated[Path, Argument(metavar="OUT.jsonl", help="Where the answers go, in the order of the input.")],
    model: Annotated[str | None, value("MODEL", "Folder, hub id or endpoint's name.", "carried")] = None,
    engine: Annotated[EngineName | None, value("ENGINE", "vllm or embedded.", "vllm with a GPU")] = None,
    images: Annotated[
        Path | None, value("FOLDER", "Start of image paths in requests.", "no paths", exists=True, file_okay=False)
    ] = None,
    allow_urls: Annotated[list[str] | None, value("HOST", "Fetch images from HOST; repeat it.", "none")] = None,
    scale_factor: options.AutoScaleFactor = None,
    max_image_tokens: options.MaxImageTokens = None,
    concurrency: Annotated[int, number("Requests at a time, of each model.")] = 32,
    overwrite: Annotated[bool, flag("--overwrite", "Start anew if OUT.jsonl exists.")] = False,
    retry_failed: Annotated[bool, flag("--retry-failed", "Ask failed rows in OUT.jsonl again.")] = False,
    endpoint: Annotated[str | None, value("URL", "Ask this OpenAI-compatible API.", "load a model")] = None,
    api_key_env: Annotated[str | None, value("VAR", "Variable that holds its key.", "no key")] = None,
    ray: Annotated[str | None, value("ADDRESS", "Ray: local, auto or HOST:PORT.", "this process")] = None,
    workers: Annotated[int | None, number("Models on Ray.", "one a GPU, or a machine")] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Answer a file in OpenAI's batch format. Called again, it goes on.

    Exit code 0: all are answered. 1: some rows are errors. 2: it cannot run. 75: stopped; it goes on.

    Examples:
        tokenpacker batch requests.jsonl answers.jsonl --images photos
        tokenpacker batch requests.jsonl out.jsonl --endpoint http://localhost:8000/v1
    """
    exclude({"--endpoint": endpoint, "--ray": ray})
    exclude({"--overwrite": overwrite, "--retry-failed": retry_failed})
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
            retry_failed=retry_failed,
        )
    print_result(as_json, {"output": str(target), **summary.to_dict()}, str(summary))
    if summary.errors:
        print_note("the same command with --retry-failed asks the failed rows again")
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
    endpoint = Endpoint(url, api_key=key, connections=concurrency, note=print_note)
    return partial(closing, endpoint), {"endpoint": endpoint.url}
