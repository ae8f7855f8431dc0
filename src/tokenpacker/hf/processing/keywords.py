"""The keywords of the processor and its parts, in transformers' form, and the check that refuses unknown ones.

transformers 5.24 still drops an unknown keyword with a warning, so that a misspelt one has no effect.
"""

# Without `from __future__ import annotations`: transformers reads these annotations as types.
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, TypedDict

from transformers.processing_utils import ImagesKwargs, ProcessingKwargs

from tokenpacker.text import did_you_mean

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
    """Options of a processor about images: those of the image processor, and two about the number of tokens."""

    scale_factor: Any  # int, or one per image, or one per tile: see `TokenPackerProcessor.__call__`
    max_image_tokens: int | None


class TokenPackerProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Keywords of `TokenPackerProcessor`, flat or nested as everywhere in transformers."""

    _defaults = {}  # type: ignore[var-annotated]  # noqa: RUF012 - transformers before 5.24 asks for it
    images_kwargs: TokenPackerImagesKwargs


def check_keywords(keywords: Mapping[str, Any], owner: str) -> None:
    """Raises ValueError for a keyword of `TokenPackerProcessor` that neither it nor its parts know, flat or nested.

    Options of videos and audio are accepted, as transformers hands them to every processor, except those that images
    have too, such as `size`: here they would be about the images.
    """
    annotations = TokenPackerProcessorKwargs.__annotations__
    known = {name: set(annotations[name].__annotations__) for name in NESTED}
    text, images = known["text_kwargs"], known["images_kwargs"]
    others = (known["videos_kwargs"] | known["audio_kwargs"]) - set(ImagesKwargs.__annotations__)
    check_names(keywords, text | images | others | set(annotations) | {"common_kwargs"}, owner)
    for name in (*NESTED, "common_kwargs"):
        if not isinstance(keywords.get(name, {}), Mapping):
            raise ValueError(f"{name}={keywords[name]!r} must be a dict of keywords")
    for name, allowed in (("text_kwargs", text), ("images_kwargs", images), ("common_kwargs", text & images)):
        check_names(keywords.get(name, {}), allowed, f"{name} of {owner}")


def check_names(names: Iterable[str], known: Collection[str], owner: str) -> None:
    """Raises ValueError for a name that is not known; the message has the nearest one that is, or all."""
    for name in names:
        if name not in known:
            remedy = did_you_mean(name, known) or f"; it has {', '.join(sorted(known))}"
            raise ValueError(f"{owner} has no option {name!r}{remedy}")
