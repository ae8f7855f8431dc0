"""`--model` to a checked folder, and a checked folder to a model: whatever is wrong is said in one line."""

from __future__ import annotations

import contextlib
import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor

MODEL_TYPE = "tokenpacker"
MODEL_FILES = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model"]
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
REMEDY = "give a folder that TokenPackerForConditionalGeneration.save_pretrained wrote, or leave --model out"


def find_model(model: str | None, files: list[str] | None = None) -> Path:
    """The folder of `--model`: the carried model, a local folder, or the cached copy of a model from the hub.

    Args:
        files: patterns of the files to fetch from the hub; all that loading needs when None.

    Raises:
        ValueError: when there is no such model, or it is of another kind.
    """
    from tokenpacker.carried import carried_model_path

    folder = carried_model_path() if model is None else Path(model).expanduser()
    if folder.is_file():
        raise ValueError(f"model {model} is a file; {REMEDY}")
    if folder.is_dir():
        _check_kind(folder)
        return folder
    _check_kind(_fetch(str(model), ["config.json"]))  # before gigabytes of another kind are fetched
    return _fetch(str(model), MODEL_FILES if files is None else files)


def load_model(
    model: str | None, verbose: bool = False
) -> tuple[TokenPackerForConditionalGeneration, TokenPackerProcessor]:
    """Model (on the GPU where there is one) and processor of `--model`, ready to answer.

    Raises:
        ValueError: as `find_model`, and when weights or tokenizer are missing, damaged or do not fit the config.
    """
    folder = find_model(model)
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        raise ValueError(f"model {folder} has no weights ({' or '.join(WEIGHT_FILES)}); {REMEDY}")
    read_json(folder / "processor_config.json")
    with _quiet(verbose):
        import torch
        from safetensors import SafetensorError

        from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor

        try:
            loaded, report = TokenPackerForConditionalGeneration.from_pretrained(
                folder, dtype="auto", output_loading_info=True
            )
            processor = TokenPackerProcessor.from_pretrained(folder)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            if verbose:
                raise
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"model {folder} cannot be loaded ({reason}); fetch it anew, or see more with -v"
            ) from error
    missing = sorted([*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])])
    if missing:  # transformers would fill these with random numbers and go on
        raise ValueError(f"model {folder} lacks {len(missing)} weights of its config, such as {missing[0]}; {REMEDY}")
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval(), processor


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a model folder. Raises ValueError where it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"model {path.parent} has no {path.name}; {REMEDY}") from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} is damaged ({error}); fetch the model anew") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (no JSON object); fetch the model anew")
    return content


def _check_kind(folder: Path) -> None:
    kind = read_json(folder / "config.json").get("model_type")
    if kind != MODEL_TYPE:
        raise ValueError(f"model {folder} is of the kind {kind!r}, not {MODEL_TYPE!r}; {REMEDY}")


def _fetch(name: str, files: list[str]) -> Path:
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise ValueError(f"model {name} does not exist; {REMEDY}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except RepositoryNotFoundError:
        raise ValueError(
            f"model {name} is neither a folder here nor on the hub (or it is private); check the name, or log in"
        ) from None
    except Exception as error:  # of several network libraries
        raise ValueError(
            f"model {name} is no folder here, and the hub cannot be reached for it ({type(error).__name__});"
            " check the name and the network, or leave --model out"
        ) from error


@contextlib.contextmanager
def _quiet(verbose: bool) -> Iterator[None]:
    """Within the context, libraries neither warn nor show bars unless the user wants to see it."""
    if verbose:
        yield
        return
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
