"""`tokenpacker speed`: what an image costs in time and memory, measured, or planned from sizes alone."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenpacker.cli.arguments import require_projectors
from tokenpacker.cli.commands.count import CONFIG_FILES, parse_size
from tokenpacker.cli.errors import keeping
from tokenpacker.cli.loading import CARRIED, find_model, load_model, placement_of, quiet
from tokenpacker.cli.options import DeviceOption, DtypeOption, JsonOption, ScaleFactorOption, VerboseOption
from tokenpacker.cli.output import print_json, print_note
from tokenpacker.hub import fetch
from tokenpacker.known_models import SHAPES
from tokenpacker.progress import Progress
from tokenpacker.text import did_you_mean

if TYPE_CHECKING:
    import torch

    from tokenpacker.hf import TokenPackerForConditionalGeneration
    from tokenpacker.speed.model_sizes import Candidate, Shapes
    from tokenpacker.speed.speed_report import SpeedReport
    from tokenpacker.speed.speed_rows import Protocol

DEFAULT_BATCH_SIZES, DEFAULT_ROUNDS = "1,8", 10
REMEDY = "give a model's folder or hub id, or one of 7b, 13b, small"


def speed(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="FOLDER|HUB-ID|7b|13b|small",
            help="Model to measure; 7b, 13b and small are --shapes. --plan reads its config alone.",
            show_default="the model that the package carries",
        ),
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(
            "--shapes",
            metavar="7b|13b|small|FILE.json",
            help="Random weights of these sizes: CLIP-L/336 with Vicuna, a small one, or a model's config.",
        ),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Answer from sizes; run nothing and load no weights.")] = False,
    projectors: Annotated[
        str,
        typer.Option(
            "--projectors",
            metavar="NAME,...",
            help="Projectors, beside average-pool and mlp which always come along.",
            show_default="the model's own",
        ),
    ] = "",
    scale_factor: ScaleFactorOption = None,
    image: Annotated[
        str | None,
        typer.Option("--image", metavar="HxW|FILE", help="Size of the images, or one to take it from."),
    ] = None,
    max_tiles: Annotated[
        int | None,
        typer.Option("--max-tiles", metavar="N", min=1, help="Most tiles, without the thumbnail.", show_default="9"),
    ] = None,
    text_tokens: Annotated[int, typer.Option("--text-tokens", metavar="N", min=1, help="Text in each prompt.")] = 64,
    output_tokens: Annotated[
        int, typer.Option("--output-tokens", metavar="N", min=1, help="Length of the long answer; the short has 1.")
    ] = 128,
    batch_sizes: Annotated[
        str | None, typer.Option("--batch-sizes", metavar="N,...", help="Images at once.", show_default="1,8")
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option("--rounds", metavar="N", min=1, help="How often everything is timed.", show_default="10"),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure vision, projector, prefill and decoding separately, with memory; or plan them.

    Examples:

        tokenpacker speed --plan --model 7b --image 2000x3000

        tokenpacker speed --shapes small --projectors token-packer,ldp-v2 --rounds 5

        tokenpacker speed --model FOLDER --device cuda --json > speed.json
    """
    names = tuple(name.strip() for name in projectors.split(",") if name.strip())
    image_size = _image_size(image)
    batches = _whole_numbers(batch_sizes or DEFAULT_BATCH_SIZES)
    if plan:
        _refuse({"--batch-sizes": batch_sizes, "--rounds": rounds, "--device": device})
    model, shapes = _named(model, shapes)
    stored = shapes is None
    folder = None  # of a stored model; a plan reads the original layout, too
    if stored:
        folder = fetch(model or CARRIED, CONFIG_FILES, REMEDY) if plan else find_model(model)
    require_projectors(names)
    with quiet(verbose):
        sizes = _read_shapes(folder, model, shapes)
        sizes = _take_images(sizes, stored, image_size, max_tiles)
        if plan:
            from tokenpacker.speed.speed_plan import make_plan

            lengths = {"text_tokens": text_tokens, "output_tokens": output_tokens}
            options: dict[str, Any] = {"projectors": names, "scale_factor": scale_factor, "dtype": dtype, **lengths}
            result: Any = make_plan(sizes, image_size, **options)
        else:
            from tokenpacker.speed.model_sizes import candidates
            from tokenpacker.speed.speed_rows import Protocol

            protocol = Protocol(
                image_size=image_size,
                batch_sizes=batches,
                text_tokens=text_tokens,
                output_tokens=output_tokens,
                rounds=rounds or DEFAULT_ROUNDS,
            )
            asked = candidates(sizes, names, scale_factor, trained=stored)
            with keeping("nothing was measured to its end; call it again, with a smaller --rounds to be sooner done"):
                result = _measure(sizes, model if stored else None, stored, asked, protocol, device, dtype)
    if as_json:
        print_json(result.to_dict())
    else:
        typer.echo(result.to_markdown())


def _named(model: str | None, shapes: str | None) -> tuple[str | None, str | None]:
    """`--model` and `--shapes`, one of them at most; a model that is a name of shapes is these. Raises ValueError."""
    if model is not None and shapes is not None:
        raise ValueError("--model and --shapes exclude each other; leave one out")
    if model in SHAPES:
        model, shapes = None, model
    if shapes is not None and shapes not in SHAPES:
        rule = f"use {', '.join(SHAPES)}, or a JSON file of a model's config{did_you_mean(shapes, SHAPES)}"
        if Path(shapes).suffix != ".json":
            raise ValueError(f"shapes {shapes!r} are unknown; {rule}")
        if not Path(shapes).is_file():
            raise ValueError(f"shapes {shapes} do not exist as a file; {rule}")
    return model, shapes


def _refuse(options: dict[str, Any]) -> None:
    """Raises ValueError for an option that was given though nothing runs."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name} {value} has no part in --plan, which runs nothing; leave one of them out")


def _read_shapes(folder: Path | None, model: str | None, shapes: str | None) -> Shapes:
    """The sizes of a stored model, or those that have a name or a file. Raises ValueError."""
    from tokenpacker.speed.model_sizes import named_shapes, shapes_of_file, shapes_of_folder

    if folder is not None:
        return shapes_of_folder(folder, model or folder.name)
    assert shapes is not None, "one of both is there"
    return named_shapes(shapes) if shapes in SHAPES else shapes_of_file(Path(shapes))


def _take_images(sizes: Shapes, stored: bool, image_size: tuple[int, int] | None, max_tiles: int | None) -> Shapes:
    """The sizes with the images that are asked for: those that are no model's cut an image as soon as one is named."""
    if not stored and image_size is not None:
        sizes = dataclasses.replace(sizes, sliced=True)
    if image_size is not None and not sizes.sliced:
        print_note(f"note: {sizes.name} itself takes an image in one piece, whatever its size")
    return sizes if max_tiles is None else dataclasses.replace(sizes, max_tiles=max_tiles)


def _measure(
    sizes: Shapes,
    model: str | None,
    stored: bool,
    asked: list[Candidate],
    protocol: Protocol,
    device: str | None,
    dtype: str | None,
) -> SpeedReport:
    """Everything measured. Raises ValueError before allocating what does not fit, and as `load_model`."""
    from tokenpacker.speed.machine import PeakMemory, attention_kernels, describe_machine
    from tokenpacker.speed.memory import require_memory
    from tokenpacker.speed.speed_report import SpeedReport
    from tokenpacker.speed.speed_run import measure_rows

    place, type_name = _where(sizes, stored, device, dtype)
    needed = require_memory(sizes, asked, protocol, type_name, place)
    built = load_model(model, device=device, dtype=dtype)[0] if stored else _random_model(sizes, type_name, place)
    with Progress("speed") as shown:
        rows = measure_rows(built, sizes, asked, protocol, partial(_tell, shown))
    attention = {
        "vision_tower": built.model.vision_tower.config._attn_implementation,
        "language_model": built.model.language_model.config._attn_implementation,
        "kernels": attention_kernels(built),
    }
    return SpeedReport(
        name=sizes.name,
        random_weights=not stored,
        dtype=type_name,
        protocol=protocol,
        image_size=protocol.image_size or sizes.config.tile_size,
        attention=attention,
        machine=describe_machine(place),
        peak_kind=PeakMemory(place).kind,
        needed_bytes=needed.total,
        rows=tuple(rows),
    )


def _where(sizes: Shapes, stored: bool, device: str | None, dtype: str | None) -> tuple[torch.device, str]:
    """The device whose memory counts, and the weights' type. Raises ValueError for what is not to be had."""
    import torch

    if dtype == "4bit" and not stored:
        raise ValueError("--dtype 4bit quantizes a stored model; random weights take float32, float16 or bfloat16")
    name = placement_of(device, dtype)["device_map"]
    if name == "auto" and not stored:
        raise ValueError("--device auto spreads a stored model; random weights need one device, such as cpu or cuda")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is not None:
        return torch.device(name), dtype
    own = getattr(sizes.config, "dtype", None) if stored else None
    fresh = torch.float32 if name == "cpu" else torch.bfloat16
    return torch.device(name), str(own or fresh).removeprefix("torch.")


def _random_model(sizes: Shapes, dtype: str, device: torch.device) -> TokenPackerForConditionalGeneration:
    import torch

    from tokenpacker.speed.memory import random_model

    return random_model(sizes.config, getattr(torch, dtype), device)


def _tell(shown: Progress, done: int, total: int, what: str) -> None:
    shown.update(done, what, total=total)


def _image_size(image: str | None) -> tuple[int, int] | None:
    if image is None:
        return None
    if Path(image).is_file():
        from tokenpacker.images import image_size

        return image_size(image)
    return parse_size(image, "--image")


def _whole_numbers(text: str) -> tuple[int, ...]:
    """Numbers of at least 1 separated by commas, each once, the smallest first."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"--batch-sizes {text!r} must be whole numbers of at least 1 with commas between, as in 1,8")
    return tuple(sorted({int(part) for part in parts}))
