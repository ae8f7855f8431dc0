"""`tokenpacker count`: what images cost, without weights and without transformers, so that it is quick."""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenpacker.cli.loading import find_model, read_json
from tokenpacker.cli.options import JsonOption, MaxImageTokensOption, MaxTilesOption, ModelOption, ScaleFactorOption
from tokenpacker.cli.output import print_json, print_note

if TYPE_CHECKING:
    from tokenpacker.projectors import ProjectorConfig
    from tokenpacker.sequence import ImageLayout
    from tokenpacker.tiling import GridList

CONFIG_FILES = ["config.json", "processor_config.json"]
RELEASED_LIMITS = (9, 16, 25)  # of which the original has lists of grids
COLUMNS = ("height", "width", "rows", "cols", "tiles", "tokens")


@dataclass(frozen=True)
class Geometry:
    """What decides an image's token count.

    Args:
        tile_size: (height, width) of a tile in pixels.
        patch_grid: (rows, cols) of patches in a tile.
    """

    tile_size: tuple[int, int]
    patch_grid: tuple[int, int]
    projector: "ProjectorConfig"
    image_mode: str = "slice"
    max_tiles: int = 9
    grid_list: "GridList" = "all"

    @classmethod
    def paper(cls, grid_list: "GridList" = "all") -> "Geometry":
        """CLIP-L/336 in TokenPacker-HD: 24 x 24 patches of 14 pixels, up to 9 tiles, scale factor 2."""
        from tokenpacker.projectors import TokenPackerProjectorConfig

        projector = TokenPackerProjectorConfig(vision_dim=1024, language_dim=4096)
        return cls(tile_size=(336, 336), patch_grid=(24, 24), projector=projector, grid_list=grid_list)

    @classmethod
    def of_model(cls, folder: Path) -> "Geometry":
        """Read from a model's processor config. Raises ValueError where that is missing or damaged."""
        from tokenpacker.projectors import config_from_dict

        config = read_json(folder / "processor_config.json")
        try:
            images = config["image_processor"]
            return cls(
                tile_size=(images["tile_size"][0], images["tile_size"][1]),
                patch_grid=(config["patch_grid"][0], config["patch_grid"][1]),
                projector=config_from_dict(config["projector_config"]),
                image_mode=images["image_mode"],
                max_tiles=images["max_tiles"],
                grid_list=images.get("grid_list", "all"),  # folders of version 0.1.0 do not say
            )
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"{folder / 'processor_config.json'} is damaged ({error!r}); fetch the model anew"
            ) from None

    def layout(
        self, image_size: tuple[int, int], scale_factor: int | None, max_image_tokens: int | None, max_tiles: int | None
    ) -> "ImageLayout":
        """The token sequence of an image of (height, width). Raises ValueError as `sequence.plan_layout`."""
        from tokenpacker.sequence import plan_layout

        return plan_layout(
            image_size,
            self.tile_size,
            self.projector.token_grid(self.patch_grid, scale_factor),
            sliced=self.image_mode == "slice",
            max_tiles=self.max_tiles if max_tiles is None else max_tiles,
            max_image_tokens=max_image_tokens,
            grid_list=self.grid_list,
        )


def count(
    images: Annotated[list[str] | None, typer.Argument(metavar="IMAGE", help="Image files.")] = None,
    sizes: Annotated[
        list[str] | None,
        typer.Option("--size", metavar="HxW", help="Count a size; repeatable; - reads one a line from stdin."),
    ] = None,
    max_tiles: MaxTilesOption = None,
    scale_factor: ScaleFactorOption = None,
    max_image_tokens: MaxImageTokensOption = None,
    model: ModelOption = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="Count with the paper's geometry instead of a model's: CLIP-L/336, 9 tiles.")
    ] = False,
    released: Annotated[
        bool,
        typer.Option(
            "--released", help="Count as the released HD models do: --paper with the original's own lists of grids."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Count the exact tokens of images, without loading weights.

    Examples:

        tokenpacker count photo.jpg scan.png

        tokenpacker count --paper --size 1080x1920 --max-image-tokens 1000

        tokenpacker count --released --max-tiles 16 --size 1344x1344

        identify -format '%hx%w\\n' *.jpg | tokenpacker count --size - --json
    """
    if not images and not sizes:
        raise ValueError("there is nothing to count; give image files, or --size HxW")
    geometry = _geometry(model, paper, released)
    rows: list[dict[str, Any]] = []
    for name, (height, width) in _named_sizes(images or [], sizes or []):
        layout = geometry.layout((height, width), scale_factor, max_image_tokens, max_tiles)
        grid = layout.tile_grid
        values = (height, width, grid.rows, grid.cols, grid.num_tiles, layout.num_tokens)
        row = dict(zip(COLUMNS, values, strict=True))
        rows.append({"image": name, **row} if name else row)
    if released and max_tiles not in (None, *RELEASED_LIMITS):
        print_note(
            f"note: the original has grids for 9, 16 and 25 tiles only; --max-tiles {max_tiles} follows their rule"
        )
    if as_json:
        print_json({"images": rows, "tokens": sum(row["tokens"] for row in rows)})
        return
    typer.echo("".join(f"{column:>8}" for column in COLUMNS))
    for row in rows:
        typer.echo("".join(f"{row[column]:>8}" for column in COLUMNS) + f"  {row.get('image', '')}".rstrip())


def _geometry(model: str | None, paper: bool, released: bool) -> Geometry:
    """The geometry that the options ask for. Raises ValueError where they ask for two, and as `find_model`."""
    options = {"--paper": paper, "--released": released, "--model": model is not None}
    asked = [name for name, given in options.items() if given]
    if len(asked) > 1:
        raise ValueError(f"{asked[0]} and {asked[1]} exclude each other; leave one out")
    if paper or released:
        return Geometry.paper("released" if released else "all")
    return Geometry.of_model(find_model(model, CONFIG_FILES))


def _named_sizes(images: list[str], sizes: list[str]) -> Iterator[tuple[str | None, tuple[int, int]]]:
    """Name (None for a bare size) and (height, width) of each thing to count."""
    from tokenpacker.images import image_size

    for image in images:
        yield image, image_size(image)
    for size in sizes:
        if size != "-":
            yield None, parse_size(size, "--size")
            continue
        for number, line in enumerate(sys.stdin, start=1):
            if line.strip():
                yield None, parse_size(line.strip(), f"line {number} of standard input")


def parse_size(text: str, where: str) -> tuple[int, int]:
    """(height, width) of a text such as `2000x3000`. Raises ValueError, which says where it stood."""
    match = re.fullmatch(r"([1-9]\d{0,8})\s*[xX×]\s*([1-9]\d{0,8})", text)
    if not match:
        raise ValueError(f"{where}: {text!r} is no size; write HEIGHTxWIDTH in pixels, for example 480x640")
    return int(match[1]), int(match[2])
