"""`tokenpacker count`: what images cost, without weights and without transformers, so that it is quick."""

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument

from tokenpacker.cli import options
from tokenpacker.cli.arguments import exclude, image_size, refuse
from tokenpacker.cli.model_files import CONFIG_FILES, PROCESSOR_FILES, Geometry, find_model
from tokenpacker.cli.options import flag, value
from tokenpacker.cli.output import print_note, print_result

if TYPE_CHECKING:
    from tokenpacker.sequence import ImageLayout

RELEASED_LIMITS = (9, 16, 25)  # for which the original has lists of grids
COLUMNS = ("height", "width", "rows", "cols", "tiles", "tokens")


def count(
    images: Annotated[list[str] | None, Argument(metavar="IMAGE", help="Image files.")] = None,
    size: Annotated[list[str] | None, value("HxW", "Size to count, repeatable; - reads stdin.")] = None,
    max_tiles: options.MaxTiles = None,
    scale_factor: options.AutoScaleFactor = None,
    max_image_tokens: options.MaxImageTokens = None,
    model: options.Model = None,
    paper: Annotated[bool, flag("--paper", "Count for CLIP-L/336 and 9 tiles, as in the paper.")] = False,
    released: Annotated[bool, flag("--released", "The same with the grids of the released HD models.")] = False,
    as_json: options.Json = False,
) -> None:
    """Count the exact tokens of images, without loading weights.

    Examples:
        tokenpacker count photo.jpg scan.png
        tokenpacker count --paper --size 1080x1920 --max-image-tokens 1000
        identify -format '%hx%w\\n' *.jpg | tokenpacker count --size - --json
    """
    if not images and not size:
        raise ValueError("there is nothing to count; give image files, or --size HxW")
    geometry = _geometry(model, paper, released)
    plan = _planner(geometry, model, size, scale_factor, max_image_tokens, max_tiles)
    rows = []
    for name, (height, width) in _named_sizes(images or [], size or []):
        layout = plan(name, (height, width))
        grid = layout.tile_grid
        values = (height, width, grid.rows, grid.cols, grid.num_tiles, layout.num_tokens)
        rows.append({"image": name} | dict(zip(COLUMNS, values, strict=True)))
    if released and max_tiles not in (None, *RELEASED_LIMITS):
        print_note(
            f"note: the original has grids for 9, 16 and 25 tiles only; --max-tiles {max_tiles} follows their rule"
        )
    head = "".join(f"{column:>8}" for column in COLUMNS)
    lines = ["".join(f"{row[column]:>8}" for column in COLUMNS) + f"  {row['image'] or ''}".rstrip() for row in rows]
    told = [{key: value for key, value in row.items() if value is not None} for row in rows]
    print_result(as_json, {"images": told, "tokens": sum(row["tokens"] for row in rows)}, "\n".join([head, *lines]))


def _geometry(model: str | None, paper: bool, released: bool) -> Geometry:
    """The geometry that the options ask for. Raises ValueError if they ask for two."""
    exclude({"--paper": paper, "--released": released, "--model": model})
    if paper or released:
        return Geometry.paper("released" if released else "all")
    return Geometry.of_model(find_model(model, CONFIG_FILES))


def _planner(
    geometry: Geometry,
    model: str | None,
    sizes: list[str] | None,
    scale_factor: Any,
    max_image_tokens: int | None,
    max_tiles: int | None,
) -> Callable[[str | None, tuple[int, int]], "ImageLayout"]:
    """A function of an image's name and size to its tokens."""
    if scale_factor != "auto":
        return lambda name, size: geometry.layout(size, scale_factor, max_image_tokens, max_tiles)
    refuse({"--size": sizes}, "has no pixels, by which --scale-factor auto decides; give image files")
    geometry.check(scale_factor, max_image_tokens)
    from tokenpacker.cli.loading import load_processor

    options = {"scale_factor": scale_factor, "max_image_tokens": max_image_tokens, "max_tiles": max_tiles}
    processor = load_processor(find_model(model, PROCESSOR_FILES))
    return lambda name, size: processor.plan_image(name, **options).layout


def _named_sizes(images: list[str], sizes: list[str]) -> Iterator[tuple[str | None, tuple[int, int]]]:
    """Name (None for a bare size) and (height, width) of each thing to count."""
    from tokenpacker import images as image_files

    for image in images:
        yield image, image_files.image_size(image)
    for size in sizes:
        if size != "-":
            yield None, image_size("--size", size)
            continue
        for number, line in enumerate(sys.stdin, start=1):
            if line.strip():
                yield None, image_size(f"line {number} of standard input", line.strip())
