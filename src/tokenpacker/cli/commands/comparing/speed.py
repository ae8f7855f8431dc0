"""`tokenpacker speed`: what an image costs in time and memory, measured, or planned from sizes alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tokenpacker.cli import options
from tokenpacker.cli.arguments import exclude, image_size, names, refuse, require_projectors, whole_numbers
from tokenpacker.cli.errors import keeping
from tokenpacker.cli.loading import load_model, placement_of, quiet
from tokenpacker.cli.model_files import CARRIED, CONFIG_FILES, find_model
from tokenpacker.cli.options import flag, number, value
from tokenpacker.cli.output import print_note, print_result
from tokenpacker.hub import SHAPES, fetch
from tokenpacker.text import did_you_mean

if TYPE_CHECKING:
    from tokenpacker.speed.model_sizes import Candidate, Shapes
    from tokenpacker.speed.speed_report import Protocol, SpeedReport

REMEDY = "give a model's folder or hub id, or one of 7b, 13b, small"
MEASURED = "Measurement"  # panel of `--help`


def speed(
    model: Annotated[str | None, value("MODEL", "Folder, hub id, name, or --shapes.", "carried")] = None,
    shapes: Annotated[str | None, value("SHAPES", "Random weights: 7b, 13b, small, or a config's JSON file.")] = None,
    plan: Annotated[bool, flag("--plan", "Compute from sizes; run nothing, load no weights.")] = False,
    projectors: Annotated[str, value("NAME,...", "Beside average-pool and mlp.", "model's")] = "",
    scale_factor: options.ScaleFactor = None,
    image: Annotated[str | None, value("HxW|FILE", "Size of the images.", "a tile")] = None,
    max_tiles: options.MaxTiles = None,
    text_tokens: Annotated[int, number("Text in each prompt.", panel=MEASURED)] = 64,
    output_tokens: Annotated[int, number("Length of the long answer.", panel=MEASURED)] = 128,
    batch_sizes: Annotated[str | None, value("N,...", "Images at once.", "1,8", MEASURED)] = None,
    rounds: Annotated[int | None, number("Rounds of timing.", "10", MEASURED)] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Time vision, projector, prefill and decoding; or plan them.

    Examples:
        tokenpacker speed --plan --model 7b --image 2000x3000
        tokenpacker speed --shapes small --projectors token-packer,ldp-v2 --rounds 5
        tokenpacker speed --model FOLDER --device cuda --json > speed.json
    """
    if plan:
        measured = {"--batch-sizes": batch_sizes, "--rounds": rounds, "--device": device}
        refuse(measured, "has no part in --plan, which runs nothing; leave one of them out")
    model, shapes = _named(model, shapes)
    asked, size = names(projectors), _size(image)
    lengths: dict[str, Any] = {"text_tokens": text_tokens, "output_tokens": output_tokens}
    batches = sorted(set(whole_numbers("--batch-sizes", batch_sizes or "1,8")))
    folder = None  # of a stored model; a plan also reads the original layout
    if shapes is None:
        folder = fetch(model or CARRIED, CONFIG_FILES, REMEDY) if plan else find_model(model)
    require_projectors(asked)
    with quiet(verbose):
        sizes = _sizes(folder, model, shapes, size, max_tiles)
        from tokenpacker.speed import model_sizes, speed_plan, speed_report

        if plan:
            given: dict[str, Any] = {"projectors": asked, "scale_factor": scale_factor, "dtype": dtype}
            result: Any = speed_plan.make_plan(sizes, size, **given, **lengths)
        else:
            protocol = speed_report.Protocol(
                image_size=size, batch_sizes=tuple(batches), rounds=rounds or 10, **lengths
            )
            candidates = model_sizes.candidates(sizes, asked, scale_factor, trained=folder is not None)
            result = _measure(folder, sizes, candidates, protocol, device, dtype)
    print_result(as_json, result.to_dict(), result.to_markdown())


def _named(model: str | None, shapes: str | None) -> tuple[str | None, str | None]:
    """`--model` and `--shapes`; a model's name may be that of shapes. Raises ValueError for both, and unknown ones."""
    exclude({"--model": model, "--shapes": shapes})
    if model in SHAPES:
        model, shapes = None, model
    if shapes is not None and shapes not in SHAPES:
        rule = f"use {', '.join(SHAPES)}, or a JSON file of a model's config{did_you_mean(shapes, SHAPES)}"
        if Path(shapes).suffix != ".json":
            raise ValueError(f"shapes {shapes!r} are unknown; {rule}")
        if not Path(shapes).is_file():
            raise ValueError(f"shapes {shapes} do not exist as a file; {rule}")
    return model, shapes


def _size(image: str | None) -> tuple[int, int] | None:
    """(height, width) that `--image` writes, or that of the file it names."""
    if image is None or not Path(image).is_file():
        return None if image is None else image_size("--image", image)
    from tokenpacker import images

    return images.image_size(image)


def _sizes(
    folder: Path | None, model: str | None, shapes: str | None, size: tuple[int, int] | None, max_tiles: int | None
) -> Shapes:
    """Sizes of a stored model, or those with a name or a file, for images of `size`. Raises ValueError for bad files.

    Shapes without a stored model cut an image into tiles as soon as its size is named.
    """
    from tokenpacker.speed.model_sizes import named_shapes, shapes_of_file, shapes_of_folder

    if folder is not None:
        sizes = shapes_of_folder(folder, model or folder.name)
    else:
        assert shapes is not None, "one of the two is given"
        sizes = named_shapes(shapes) if shapes in SHAPES else shapes_of_file(Path(shapes))
        sizes = dataclasses.replace(sizes, sliced=sizes.sliced or size is not None)
    if size is not None and not sizes.sliced:
        print_note(f"note: {sizes.name} itself takes an image in one piece, whatever its size")
    return sizes if max_tiles is None else dataclasses.replace(sizes, max_tiles=max_tiles)


def _measure(
    folder: Path | None,
    sizes: Shapes,
    candidates: list[Candidate],
    protocol: Protocol,
    device: str | None,
    dtype: str | None,
) -> SpeedReport:
    """Measures the model of a folder, or one of random weights if that is None."""
    import torch

    from tokenpacker.speed.speed_run import measure

    if folder is None:
        refuse({"--dtype 4bit": dtype == "4bit"}, "quantizes a stored model; random weights take another type")
        refuse({"--device auto": device == "auto"}, "spreads a stored model; random weights need cpu or cuda")
    load = None if folder is None else lambda: load_model(str(folder), device=device, dtype=dtype)[0]
    place = placement_of(device, dtype)["device_map"]
    if place == "auto":
        place = "cuda" if torch.cuda.is_available() else "cpu"
    with keeping("nothing was measured to its end; call it again, with a smaller --rounds to be sooner done"):
        return measure(sizes, candidates, protocol, torch.device(place), dtype, load=load)
