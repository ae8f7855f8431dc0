"""`--model` to a checked folder, and a checked folder to a model: whatever is wrong is said in one line."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenpacker.cli.arguments import check_dtype, split_device
from tokenpacker.hub import fetch, is_released

if TYPE_CHECKING:
    from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor

MODEL_TYPE = "tokenpacker"
RELEASED_TYPES = ("llava", "llava_llama")
MODEL_FILES = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model"]
REGION_MODEL = "tiny-regions"  # carried; stands in where regions may be asked about
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
CARRIED = "tiny"  # what answers where no model is named
REMEDY = "give a folder that TokenPackerForConditionalGeneration.save_pretrained wrote, or leave --model out"


def find_model(model: str | None, files: list[str] | None = None) -> Path:
    """The folder of `--model`: a carried model, a local folder, or the cached copy of a model from the hub.

    Args:
        files: patterns of the files to fetch from the hub; all that loading needs when None.

    Raises:
        ValueError: when there is no such model, or it is of another kind.
    """
    name = CARRIED if model is None else model
    if is_released(name) and not Path(name).exists():
        raise ValueError(f"model {name} is in the original layout; first run: tokenpacker convert {name} DST")
    _check_kind(fetch(name, ["config.json"], REMEDY))  # before gigabytes of another kind are fetched
    return fetch(name, MODEL_FILES if files is None else files, REMEDY)


def load_model(
    model: str | None,
    verbose: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    *,
    scale_factor: int | None = None,
    max_image_tokens: int | None = None,
) -> tuple[TokenPackerForConditionalGeneration, TokenPackerProcessor]:
    """Model and processor of `--model`, ready to answer.

    Args:
        device: where the weights go; `auto` spreads them; None is the GPU where there is one.
        dtype: of the weights, or `4bit` for the language model's; None takes them as stored.
        scale_factor: that will be asked for, with `max_image_tokens`: what cannot be is told before loading.

    Raises:
        ValueError: as `find_model`, for a device or type that is not to be had, a scale factor and a budget that no
            image can have, and when weights or tokenizer are missing, damaged or do not fit the config.
        ImportError: for `4bit` without bitsandbytes.
    """
    folder = find_model(model)
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        raise ValueError(f"model {folder} has no weights ({' or '.join(WEIGHT_FILES)}); {REMEDY}")
    from tokenpacker.cli.commands.count import Geometry

    geometry = Geometry.of_model(folder)
    if scale_factor is not None or max_image_tokens is not None:
        geometry.layout((1, 1), scale_factor, max_image_tokens, None)  # refuses what cannot be
    placement = placement_of(device, dtype)
    with quiet(verbose):
        from safetensors import SafetensorError

        from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor

        try:
            loaded, report = TokenPackerForConditionalGeneration.from_pretrained(
                folder, output_loading_info=True, **placement
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
    return loaded.eval(), processor


def placement_of(device: str | None, dtype: str | None) -> dict[str, Any]:
    """Arguments of `from_pretrained` for `--device` and `--dtype`. Raises as `load_model`."""
    if dtype is not None:
        check_dtype(dtype)
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, index = split_device(device)
    if kind == "cuda" and (index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {device} is not there: torch sees {torch.cuda.device_count()} CUDA devices; use cpu"
        )
    if dtype != "4bit":
        return {"device_map": device, "dtype": dtype or "auto"}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("--dtype 4bit needs bitsandbytes; run: pip install bitsandbytes")
    from tokenpacker.hf import four_bit_config

    compute = torch.float32 if kind == "cpu" else torch.bfloat16
    return {"device_map": device, "dtype": compute, "quantization_config": four_bit_config(compute)}


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
    if kind in RELEASED_TYPES:
        raise ValueError(f"model {folder} is in the original layout; first run: tokenpacker convert {folder} DST")
    if kind != MODEL_TYPE:
        raise ValueError(f"model {folder} is of the kind {kind!r}, not {MODEL_TYPE!r}; {REMEDY}")


@contextlib.contextmanager
def quiet(verbose: bool = False) -> Iterator[None]:
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
