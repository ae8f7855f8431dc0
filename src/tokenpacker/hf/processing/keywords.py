"""The keywords of the processor and its parts, in transformers' form, and the refusal of those that none of them knows.

transformers drops a keyword that it does not know with a warning, so that a misspelt one has no effect.
"""

# Without `from __future__ import annotations`: transformers reads these annotations as types.
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, Literal, TypedDict

from transformers.processing_utils import ImagesKwargs, ProcessingKwargs

ImageMode = Literal["slice", "pad", "square"]
NESTED = ("text_kwargs", "images_kwargs", "videos_kwargs", "audio_kwargs")


class TokenPackerImageProcessorKwargs(TypedDict, total=False):
    """Options of an image processor, for one call or all; see `TokenPackerImageProcessor`."""

    image_mode: ImageMode | None
    tile_size: list[int] | tuple[int, ...] | None
    max_tiles: int | None
    thumbnail_source: Literal["image", "canvas"] | None
    antialias: bool | None
    grid_list: Literal["all", "released"] | None
    do_convert_rgb: bool | None
    do_rescale: bool | None
    rescale_factor: float | int | None
    do_normalize: bool | None
    image_mean: list[float] | tuple[float, ...] | None
    image_std: list[float] | tuple[float, ...] | None
    input_data_format: Any
    return_tensors: Any


class TokenPackerImagesKwargs(TokenPackerImageProcessorKwargs, total=False):
    """What a processor decides about images: the image processor's options, and how many tokens they get."""

    scale_factor: Any  # int, or one per image, or one per tile: see `TokenPackerProcessor.__call__`
    max_image_tokens: int | None


class TokenPackerProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Keywords of `TokenPackerProcessor`, flat or nested as everywhere in transformers."""

    _defaults = {}  # type: ignore[var-annotated]  # noqa: RUF012 - transformers before 5.24 asks for it
    images_kwargs: TokenPackerImagesKwargs


def check_keywords(keywords: Mapping[str, Any], owner: str) -> None:
    """Raises ValueError for a keyword of `TokenPackerProcessor` that neither it nor its parts know, flat or nested.

    Options of videos and audio are known, as transformers hands them to every processor; without a video they say
    nothing. Those that images have too, such as `size`, are refused: here they would be about the images.
    """
    known = {name: set(kind.__annotations__) for name, kind in _nested_kinds().items()}
    others = (known["videos_kwargs"] | known["audio_kwargs"]) - set(ImagesKwargs.__annotations__)
    flat = known["text_kwargs"] | known["images_kwargs"] | others | set(TokenPackerProcessorKwargs.__annotations__)
    shared = known["text_kwargs"] & known["images_kwargs"]
    check_names((name for name in keywords if name != "common_kwargs"), flat, owner)
    for name in (*NESTED, "common_kwargs"):
        inner = keywords.get(name, {})
        if not isinstance(inner, Mapping):
            raise ValueError(f"{name}={inner!r} must be a dict of keywords")
        if name in ("text_kwargs", "images_kwargs"):
            check_names(inner, known[name], f"{name} of {owner}")
        elif name == "common_kwargs":
            check_names(inner, shared, f"common_kwargs of {owner}")


def check_names(names: Iterable[str], known: Collection[str], owner: str) -> None:
    """Raises ValueError for a name that is not known; the message has the nearest one that is, or all."""
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(known))}"
            raise ValueError(f"{owner} has no option {name!r}; {remedy}")


def _nested_kinds() -> dict[str, Any]:
    annotations = TokenPackerProcessorKwargs.__annotations__
    return {name: annotations[name] for name in NESTED}
