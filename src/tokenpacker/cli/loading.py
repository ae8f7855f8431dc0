"""A model and its processor from a folder. Whatever is wrong is said in one line, if possible before loading."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenpacker.cli.arguments import split_device
from tokenpacker.cli.model_files import REMEDY, Geometry, find_model, read_json

if TYPE_CHECKING:
    from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


def load_model(
    model: str | None,
    verbose: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    *,
    scale_factor: int | str | None = None,
    max_image_tokens: int | None = None,
) -> tuple[TokenPackerForConditionalGeneration, TokenPackerProcessor]:
    """Model and processor of `--model`, ready to answer.

    Args:
        device: where the weights go; `auto` spreads them; None is the GPU if there is one.
        dtype: of the weights, or `4bit` for the language model's; None takes them as stored.
        scale_factor: will be asked for, like `max_image_tokens`; both are checked before loading.

    Raises:
        ValueError: for a model that is not found, a device that is not there, a scale factor or limit that no image
            can meet, and weights or a tokenizer that are missing, damaged or do not fit the config.
        ImportError: for `4bit` without bitsandbytes.
    """
    folder = find_model(model)
    if (folder / "export.json").is_file():
        raise ValueError(
            f"model {folder} is an export for another runtime; tokenpacker.export.ExportedAnswerer answers from it, or"
            " give the model that was exported"
        )
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        raise ValueError(f"model {folder} has no weights ({' or '.join(WEIGHT_FILES)}); {REMEDY}")
    geometry = Geometry.of_model(folder)
    if scale_factor is not None or max_image_tokens is not None:
        geometry.check(scale_factor, max_image_tokens)
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
    """Arguments of `from_pretrained` for `--device` and `--dtype`.

    Raises:
        ValueError: for a device that is not there.
        ImportError: for `4bit` without bitsandbytes.
    """
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


def load_processor(folder: Path) -> TokenPackerProcessor:
    """The processor of a model folder. Raises ValueError if it is missing, damaged or cannot be loaded."""
    read_json(folder / "processor_config.json")
    with quiet():
        from tokenpacker.hf import TokenPackerProcessor

        try:
            return TokenPackerProcessor.from_pretrained(folder)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"the processor in {folder} cannot be loaded ({reason}); fetch the model anew") from error


@contextlib.contextmanager
def quiet(verbose: bool = False) -> Iterator[None]:
    """Within the context, libraries neither warn nor show progress bars, unless `verbose`."""
    if verbose:
        yield
        return
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def quiet_exporters(verbose: bool) -> Iterator[None]:
    """Within the context, exporters print nothing; with `verbose`, to standard error."""
    with quiet(verbose), contextlib.redirect_stdout(sys.stderr if verbose else io.StringIO()):
        loggers = [logging.getLogger(name) for name in ("torch.onnx", "nncf", "onnxscript", "root")]
        before = [logger.level for logger in loggers]
        try:
            for logger in loggers if not verbose else ():
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)
