"""A folder with a page that runs a model inside the browser, on any host of plain files.

It holds the exported model, the page (`static/`), and from npm ONNX Runtime Web and a tokenizer. The page cuts pictures
and writes prompts as the processor does; what it needs to know of the processor stands in `page.json`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenpacker.checkpoints.model_folder import new_folder
from tokenpacker.hf.processing.scale_factors import own_scale_factor
from tokenpacker.projectors import config_from_dict
from tokenpacker.ui.npm_packages import RUNTIME, TOKENIZER, unpack

if TYPE_CHECKING:
    from tokenpacker.export.manifest import Manifest
    from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor

STATIC = Path(__file__).with_name("static")
VENDOR = "vendor"
MAX_WEIGHT_BYTES = 400_000_000  # in float32; a browser's tab has about 2 GB, and needs each weight more than once
EXTERNAL_BYTES = 1_000_000  # weights from which the encoders of all scale factors share one file
SCALE_FACTORS = (2, 3, 4)
MAX_NEW_TOKENS = 64
OPTIONS = ("tile_size", "max_tiles", "grid_list", "image_mean", "image_std", "rescale_factor")
NEEDED_OPTIONS = {"image_mode": "slice", "thumbnail_source": "image", "antialias": True, "do_convert_rgb": True}
NEEDED_OPTIONS |= {"do_rescale": True, "do_normalize": True}
EXAMPLES = (15, 7, 2, 9)  # numbers of test pictures of fine print, which the carried model's training never showed
QUESTION = "\N{WHITE SQUARE}"  # stands for the question while the prompt is taken apart


def write_static_page(
    model: TokenPackerForConditionalGeneration,
    processor: TokenPackerProcessor,
    folder: Path | str,
    *,
    name: str = "tiny",
    scale_factors: Sequence[int] | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Path:
    """Writes the page of a model into `folder`, which appears when it is complete, and returns it.

    The folder is also an exported model, as `tokenpacker export` writes it.

    Args:
        name: of the model, as the page shows it.
        scale_factors: those that the page offers, the default first. None takes the projector's own, and of 2, 3 and 4
            those that it can have.
        overwrite: replace a page or a model that is there.
        progress: gets the name of each step as it begins.

    Raises:
        ValueError: for a place that is taken, and a model that is too large or that the page cannot run.
        ImportError: for a package that the export needs.
        OSError: if a package of npm is neither in the cache nor on the registry.
    """
    from tokenpacker.export.exporting import export_model, require_packages

    require_packages("onnx", None)
    num_bytes = 4 * sum(weight.numel() for weight in model.parameters())
    _check_model(processor, name, num_bytes)
    factors = _scale_factors(processor) if scale_factors is None else list(scale_factors)
    with new_folder(Path(folder), (len(factors) + 2) * num_bytes, overwrite) as partial:
        vendor = partial / VENDOR
        vendor.mkdir()
        for package in (RUNTIME, TOKENIZER):
            progress(f"{package.name} {package.version}")
            unpack(package, vendor)
        exported = partial / "exported"
        manifest = export_model(
            model,
            processor,
            exported,
            to="onnx",
            scale_factors=factors,
            external_bytes=EXTERNAL_BYTES,
            progress=lambda number, total, step: progress(f"{step} ({number} of {total})"),
        )
        for path in exported.iterdir():
            path.rename(partial / path.name)
        exported.rmdir()
        shutil.copytree(STATIC, partial, dirs_exist_ok=True)
        page = {"model": name, **describe(model, processor, manifest), "examples": _draw_examples(partial)}
        page["files"] = {path: (partial / path).stat().st_size for path in page["files"]}
        (partial / "page.json").write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")
    return Path(folder)


def describe(
    model: TokenPackerForConditionalGeneration, processor: TokenPackerProcessor, manifest: Manifest
) -> dict[str, Any]:
    """What the page knows of a model and its processor; under `files` the paths that it loads."""
    graphs = {name: {"graph": name, "weights": _weights_of(name, manifest)} for name in manifest.files if name.endswith(".onnx")}
    projector, patch_grid = config_from_dict(processor.projector_config), (processor.patch_grid[0], processor.patch_grid[1])
    encoders = {entry["scale_factor"]: graphs[entry["file"]] for entry in manifest.vision_encoders}
    ends = model.generation_config.eos_token_id
    runtime = f"{VENDOR}/{Path(RUNTIME.files[1]).name}"
    return {
        "version": manifest.tokenpacker,
        "runtime": runtime,
        "processor": {option: getattr(processor.image_processor, option) for option in OPTIONS},
        "patch_grid": patch_grid,
        "scale_factor": manifest.scale_factors[0],
        "scale_factors": {
            factor: {"token_grid": projector.token_grid(patch_grid, factor), "encoder": encoder}
            for factor, encoder in encoders.items()
        },
        "embed_tokens": graphs[manifest.embed_tokens],
        "decoder": {**graphs[manifest.decoder], **manifest.cache},
        "image_token": processor.image_token,
        "image_token_id": processor.image_token_id,
        "tile_separator_id": processor.tile_separator_id,
        "row_separator_id": processor.row_separator_id,
        "eos_token_ids": ends if isinstance(ends, list) else [ends],
        "max_positions": manifest.max_positions,
        "max_new_tokens": MAX_NEW_TOKENS,
        "prompt": _prompt(processor),
        "files": ["tokenizer.json", "tokenizer_config.json", runtime, *(f for f in manifest.files if f.startswith("onnx/"))],
    }


def _weights_of(graph: str, manifest: Manifest) -> list[str]:
    return []


def _prompt(processor: TokenPackerProcessor) -> dict[str, Any]:
    """What stands before and after the question about one picture."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    before, after = text.split(QUESTION)
    starts = bool(processor.tokenizer.bos_token) and before.startswith(processor.tokenizer.bos_token)
    return {"before": before, "after": after, "add_special_tokens": not starts}


def _check_model(processor: TokenPackerProcessor, name: str, num_bytes: int) -> None:
    if num_bytes > MAX_WEIGHT_BYTES:
        raise ValueError(
            f"model {name} has {num_bytes / 1e6:,.0f} MB of weights, and a page takes {MAX_WEIGHT_BYTES / 1e6:.0f};"
            " use a smaller model, or a server: tokenpacker ui"
        )
    for option, needed in NEEDED_OPTIONS.items():
        value = getattr(processor.image_processor, option)
        if value != needed:
            raise ValueError(f"model {name} has {option}={value!r}, and the page knows {needed!r} only; use a server: tokenpacker ui")
    if processor.tokenizer.init_kwargs.get("llama_variant"):
        raise ValueError(f"model {name} has a tokenizer of released weights, which the page lacks; use a server: tokenpacker ui")


def _scale_factors(processor: TokenPackerProcessor) -> list[int]:
    """The projector's own scale factor, then those of `SCALE_FACTORS` that it can have."""
    projector, patch_grid = config_from_dict(processor.projector_config), (processor.patch_grid[0], processor.patch_grid[1])
    own = own_scale_factor(projector, patch_grid)
    if own is None:
        raise ValueError("the projector's tokens have no scale factor, which the page needs; use a server: tokenpacker ui")

    def fits(factor: int) -> bool:
        try:
            return projector.token_grid(patch_grid, factor) is not None
        except ValueError:
            return False

    return [own, *(factor for factor in SCALE_FACTORS if factor != own and fits(factor))]


def _draw_examples(folder: Path) -> list[dict[str, Any]]:
    """Draws signs that the carried model can read, and returns their places and questions."""
    from tokenpacker.scenes.fine_print import FinePrint

    (folder / "examples").mkdir()
    examples = []
    for number, index in enumerate(EXAMPLES, start=1):
        sample, picture = FinePrint("test")[index], f"examples/sign-{number}.png"
        sample.image.save(folder / picture)
        examples.append({"picture": picture, "questions": [question.text for question in sample.questions]})
    return examples
