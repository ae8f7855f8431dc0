"""`tokenpacker show`: a picture of what the language model gets to see."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokenpacker.cli.loading import load_model
from tokenpacker.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    MaxImageTokensOption,
    ModelOption,
    ScaleFactorOption,
    VerboseOption,
)
from tokenpacker.cli.output import check_picture, image_notes_on_stderr, print_json, print_note

if TYPE_CHECKING:
    import numpy as np

    from tokenpacker.visualize import PackedImage


def show(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="Image file.")],
    out: Annotated[Path, typer.Option("--out", metavar="PAGE.png", help="Where the page is written.")],
    token: Annotated[
        int | None,
        typer.Option("--token", metavar="K", help="The token to explain.", show_default="the most selective one"),
    ] = None,
    model: ModelOption = None,
    scale_factor: ScaleFactorOption = None,
    max_image_tokens: MaxImageTokensOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Draw an image's tiles, its packed tokens, and one token's attention over its window.

    Examples:

        tokenpacker show sign.png --out page.png

        tokenpacker show sign.png --out page.png --token 40 --scale-factor 3
    """
    check_picture(out, "--out")
    from tokenpacker.images import load_image

    with image_notes_on_stderr():
        picture = load_image(image)
    budget = {"scale_factor": scale_factor, "max_image_tokens": max_image_tokens}
    loaded, processor = load_model(model, verbose, device, dtype, **budget)
    from tokenpacker.visualize import PackedImage, draw_page

    packed = PackedImage.plan(processor, picture, **budget)
    if token is not None:
        check_token(packed, token)
    weights = packed.attention(loaded, processor)
    chosen = clearest_token(packed, weights) if token is None and weights is not None else token
    shown = None if weights is None or chosen is None else _token_weights(packed, weights, chosen)
    if weights is None:
        print_note(f"note: the {loaded.config.projector.name} projector has no window attention; the page shows none")
    draw_page(packed, Path(image).name, chosen, shown).save(out)
    if as_json:
        grid = packed.layout.tile_grid
        source = None if chosen is None else packed.source(chosen)
        result = {
            "page": str(out),
            "rows": grid.rows,
            "cols": grid.cols,
            "tiles": grid.num_tiles,
            "tokens": packed.layout.num_tokens,
            "full_tokens": packed.num_full_tokens,
            "token": chosen,
            "box": None if source is None or source.box is None else [round(edge, 1) for edge in source.box],
            "attention": None if shown is None else shown.mean(axis=0).astype(float).round(4).tolist(),
        }
        print_json(result)
    else:
        typer.echo(str(out))


def clearest_token(packed: "PackedImage", weights: "np.ndarray") -> int | None:
    """The token whose window shows most and whose attention chooses most, among those that show more than padding.

    That is the largest product of the pixels' contrast, so that it is no blank one, and of how far the largest weight,
    heads averaged, lies above an even one, so that it is no window of a single patch at the edge.
    """
    from PIL import ImageStat

    grey = packed.image.convert("L")
    clarity: dict[int, float] = {}
    for token in range(packed.layout.num_tokens):
        source = packed.source(token)
        if source is None or source.box is None or source.is_thumbnail:
            continue
        top, left, bottom, right = source.box
        pixels = grey.crop((int(left), int(top), math.ceil(right), math.ceil(bottom)))
        mean = _token_weights(packed, weights, token).mean(axis=0)
        clarity[token] = ImageStat.Stat(pixels).stddev[0] * float(mean.max() - 1 / mean.size)
    return max(clarity, key=lambda token: clarity[token], default=None)


def check_token(packed: "PackedImage", token: int) -> None:
    """Raises ValueError unless the image has this token and it is no separator."""
    count = packed.layout.num_tokens
    if not 0 <= token < count:
        raise ValueError(f"token {token} does not exist; the image has the tokens 0 to {count - 1}")
    if packed.source(token) is None:
        raise ValueError(f"token {token} is a separator and shows nothing; choose another, such as {token - 1}")


def _token_weights(packed: "PackedImage", weights: "np.ndarray", token: int) -> "np.ndarray":
    """(H, rows, cols) of one token of the sequence, which is no separator: the weights of the patches that exist."""
    tile, place = divmod(token, packed.layout.tokens_per_tile + packed.layout.separators)
    source = packed.source(token)
    assert source is not None
    rows, cols = packed.window_patches(source)
    return weights[tile, place, :, :rows, :cols]
