"""A folder with a page that runs a model inside the browser, on any host of plain files.

It holds the exported model, the page (`static/`), and from npm ONNX Runtime Web and a tokenizer. The page cuts pictures
and writes prompts as the processor does; what it needs to know of the processor stands in `page.json`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
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
# Test pictures of fine print, which the carried model's training never showed, and questions that it answers correctly
# with 2, 3 and 4.
EXAMPLES = {
    15: ("what number is in the green box?", "what word is in the red box?", "what shape is just above the number 32?"),
    7: (
        "which word is just below the circle?",
        "which box is the word book in?",
        "what number is just below the cross?",
    ),
    2: ("what word is in the black box?", "which number is in the red box?", "what word is just below the cross?"),
    8: ("what word is in the purple box?", "what color is the word fox?", "how many words are there?"),
}
QUESTION = "\N{WHITE SQUARE}"  # stands for the question while the prompt is taken apart


def write_static_page(
    model: TokenPackerForConditionalGeneration,
    processor: TokenPackerProcessor,
    folder: Path | str,
    *,
    name: str = "tiny",
    scale_factors: Sequence[int] | None = None,
    overwrite: bool = False,
    sources: Sequence[Path] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> Path:
    """Writes the page of a model into `folder`, which appears when it is complete, and returns it.

    The folder is also an exported model, as `tokenpacker export` writes it.

    Args:
        name: of the model, as the page shows it.
        scale_factors: those that the page offers, the default first. None takes the projector's own, and of 2, 3 and 4
            those that it can have.
        overwrite: replace a page or a model that is there.
        sources: folders that the model was read from; `folder` may hold none of them.
        progress: gets the name of each step as it begins.

    Raises:
        ValueError: for a place that is taken or holds a source, and a model that is too large or that the page cannot
            run.
        ImportError: for a package that the export needs.
        OSError: if a package of npm is neither in the cache nor on the registry.
    """
    from tokenpacker.export.exporting import export_model, require_packages

    require_packages("onnx", None)
    num_bytes = 4 * sum(weight.numel() for weight in model.parameters())
    _check_model(processor, name, num_bytes)
    factors = _scale_factors(processor) if scale_factors is None else list(scale_factors)
    with new_folder(Path(folder), (len(factors) + 2) * num_bytes, overwrite, sources) as partial:
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
    """What the page knows of a model and its processor; `files` are the paths that it loads."""
    projector = config_from_dict(processor.projector_config)
    rows, cols = processor.patch_grid
    first = manifest.vision_encoders[0]["file"]  # the encoders of all scale factors share its file of weights
    ends = model.generation_config.eos_token_id
    runtime = f"{VENDOR}/{Path(RUNTIME.files[1]).name}"
    graphs = [name for name in manifest.files if name.startswith("onnx/")]

    def graph(name: str, owner: str) -> dict[str, Any]:
        return {"graph": name, "weights": [file for file in graphs if file.startswith(f"{owner}_data")]}

    return {
        "version": manifest.tokenpacker,
        "runtime": runtime,
        "processor": {option: getattr(processor.image_processor, option) for option in OPTIONS},
        "patch_grid": (rows, cols),
        "scale_factor": manifest.scale_factors[0],
        "scale_factors": {
            factor: {"token_grid": projector.token_grid((rows, cols), factor), "encoder": graph(entry["file"], first)}
            for factor, entry in zip(manifest.scale_factors, manifest.vision_encoders, strict=True)
        },
        "embed_tokens": graph(manifest.embed_tokens, manifest.embed_tokens),
        "decoder": {**graph(manifest.decoder, manifest.decoder), **manifest.cache},
        "image_token": processor.image_token,
        "image_token_id": processor.image_token_id,
        "region_token_id": processor.region_token_id,
        "tile_separator_id": processor.tile_separator_id,
        "row_separator_id": processor.row_separator_id,
        "eos_token_ids": ends if isinstance(ends, list) else [ends],
        "max_positions": manifest.max_positions,
        "max_new_tokens": MAX_NEW_TOKENS,
        "prompt": _prompt(processor),
        "files": ["tokenizer.json", "tokenizer_config.json", runtime, *graphs],
    }


def _prompt(processor: TokenPackerProcessor) -> dict[str, Any]:
    """What stands before and after the question about one picture."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    before, after = text.split(QUESTION)
    starts = bool(processor.tokenizer.bos_token) and before.startswith(processor.tokenizer.bos_token)
    return {"before": before, "after": after, "add_special_tokens": not starts}


def _check_model(processor: TokenPackerProcessor, name: str, num_bytes: int) -> None:
    remedy = "use a server instead: tokenpacker ui"
    if num_bytes > MAX_WEIGHT_BYTES:
        raise ValueError(
            f"model {name} has {num_bytes / 1e6:,.0f} MB of weights in float32, and a page takes"
            f" {MAX_WEIGHT_BYTES / 1e6:.0f}; {remedy}"
        )
    for option, needed in NEEDED_OPTIONS.items():
        value = getattr(processor.image_processor, option)
        if value != needed:
            raise ValueError(f"model {name} has {option}={value!r}, and the page knows {needed!r} only; {remedy}")
    if processor.tokenizer.init_kwargs.get("llama_variant"):
        raise ValueError(f"model {name} has a tokenizer of released weights, which the page lacks; {remedy}")


def _scale_factors(processor: TokenPackerProcessor) -> list[int]:
    """The projector's own scale factor, then those of `SCALE_FACTORS` that it can have."""
    projector = config_from_dict(processor.projector_config)
    rows, cols = processor.patch_grid
    own = own_scale_factor(projector, (rows, cols))
    if own is None:
        raise ValueError("the projector's tokens have no scale factor, which the page needs; use tokenpacker ui")
    fitting = []
    for factor in SCALE_FACTORS:
        with suppress(ValueError):
            projector.token_grid((rows, cols), factor)
            fitting.append(factor)
    return [own, *(factor for factor in fitting if factor != own)]


def _draw_examples(folder: Path) -> list[dict[str, Any]]:
    """Draws signs that the carried model can read, and returns their places and questions."""
    from tokenpacker.scenes.fine_print import FinePrint

    pictures = FinePrint("test")
    (folder / "examples").mkdir()
    examples = []
    for index, questions in EXAMPLES.items():
        picture = f"examples/sign-{index}.png"
        pictures[index].image.save(folder / picture)
        examples.append({"picture": picture, "questions": questions})
    return examples
