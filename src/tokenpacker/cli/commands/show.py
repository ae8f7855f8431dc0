"""`tokenpacker show`: a picture of what the language model gets to see."""

from pathlib import Path
from typing import Annotated, Any

from typer import Argument

from tokenpacker.cli import options
from tokenpacker.cli.arguments import check_picture
from tokenpacker.cli.loading import load_model
from tokenpacker.cli.options import value
from tokenpacker.cli.output import image_notes_on_stderr, print_note, print_result


def show(
    image: Annotated[str, Argument(metavar="IMAGE", help="Image file.")],
    out: options.Page,
    token: Annotated[int | None, value("K", "The token to explain, counted from 0.", "the most selective one")] = None,
    model: options.Model = None,
    scale_factor: options.AutoScaleFactor = None,
    max_image_tokens: options.MaxImageTokens = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Draw an image's tiles, packed tokens, and a token's attention.

    Examples:
        tokenpacker show sign.png --out page.png
        tokenpacker show sign.png --out page.png --token 40 --scale-factor 3
        tokenpacker show sign.png --out page.png --scale-factor auto
    """
    check_picture(out, "--out", in_folder=True)
    from tokenpacker.images import load_image

    with image_notes_on_stderr():
        picture = load_image(image)
    budget: dict[str, Any] = {"scale_factor": scale_factor, "max_image_tokens": max_image_tokens}
    loaded, processor = load_model(model, verbose, device, dtype, **budget)
    from tokenpacker.visualize import PackedImage, draw_page
    from tokenpacker.visualize.explained_token import check_token, clearest_token, token_weights

    packed = PackedImage.plan(processor, picture, **budget)
    if token is not None:
        check_token(packed, token)
    weights = packed.attention(loaded, processor)
    chosen = clearest_token(packed, weights) if token is None and weights is not None else token
    attention = None if weights is None or chosen is None else token_weights(packed, weights, chosen)
    if weights is None:
        print_note(f"note: the {loaded.config.projector.name} projector has no window attention; the page shows none")
    draw_page(packed, Path(image).name, chosen, attention).save(out)
    grid = packed.layout.tile_grid
    source = None if chosen is None else packed.source(chosen)
    result = {
        "page": str(out),
        "rows": grid.rows,
        "cols": grid.cols,
        "tiles": grid.num_tiles,
        "tokens": packed.layout.num_tokens,
        "full_tokens": packed.num_full_tokens,
        "scale_factors": list(packed.scale_factors),
        "reasons": packed.reasons,
        "token": chosen,
        "box": None if source is None or source.box is None else [round(edge, 1) for edge in source.box],
        "attention": None if attention is None else attention.mean(axis=0).astype(float).round(4).tolist(),
    }
    print_result(as_json, result, str(out))
