"""`tokenpacker ask`: one question about one or more images."""

import os
from typing import Annotated, Any

import typer
from typer import Argument

from tokenpacker.cli import options
from tokenpacker.cli.errors import INTERRUPTED
from tokenpacker.cli.loading import load_model
from tokenpacker.cli.model_files import CARRIED_REGIONS
from tokenpacker.cli.output import image_notes_on_stderr, print_json, print_note, print_piece
from tokenpacker.cli.region_arguments import read_region


def ask(
    images: Annotated[
        list[str],
        Argument(
            metavar="IMAGE",
            default_factory=list,
            show_default=False,
            help="One image or more, in the order of the question.",
        ),
    ],
    question: Annotated[str, Argument(metavar="QUESTION", help="The question, in quotes.")],
    model: options.Model = None,
    scale_factor: options.AutoScaleFactor = None,
    max_image_tokens: options.MaxImageTokens = None,
    max_new_tokens: options.MaxNewTokens = 256,
    regions: options.Regions = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Ask about images. The answer is streamed; then its cost is told.

    Examples:
        tokenpacker ask sign.png "what number is in the red box?"
        tokenpacker ask before.png after.png "what changed?" --scale-factor 3 --json
        tokenpacker ask signs.png "what colors are <mask> and <mask>?" --box 10,10,60,40 --mask mask.png
    """
    if os.path.isfile(question):  # pathlib would raise on a long question
        if not images:
            raise ValueError(f"{question} has no question; write it behind the image, in quotes")
        raise ValueError(f"the last argument, {question}, is a file; write the images first and then the question")
    if not images:
        raise ValueError(f"the question {question!r} has no image; write the image's path before it")
    if not question.strip():
        raise ValueError("the question is empty; write it behind the images, in quotes")
    from tokenpacker.images import load_image

    with image_notes_on_stderr():
        pictures = [load_image(image) for image in images]
    marked = [read_region(region, pictures) for region in regions or []]
    if marked or "<mask>" in question:
        model = model or CARRIED_REGIONS
    budget: dict[str, Any] = {"scale_factor": scale_factor, "max_image_tokens": max_image_tokens}
    loaded, processor = load_model(model, verbose, device, dtype, **budget)
    from tokenpacker.cli.conversation import Conversation

    conversation = Conversation(loaded, processor, max_new_tokens=max_new_tokens, **budget)
    packed = [conversation.pack(picture) for picture in pictures]
    for number, region in enumerate(marked, start=1):
        conversation.check_region(region, packed[region.image], number)
    answer = conversation.ask(question, packed, (lambda _: None) if as_json else print_piece, marked)
    if as_json:
        told = [region.to_dict() for region in marked]
        print_json({"images": images, "question": question, "regions": told, **answer.to_dict()})
    else:
        print_piece("\n")
        print_note(answer.summary())
    if answer.interrupted:
        raise typer.Exit(INTERRUPTED)
