"""Options that several commands share."""

from typing import Annotated

import typer

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="FOLDER|HUB-ID",
        help="Model folder, its name on the Hugging Face hub, or that of a carried model; `models` lists names.",
        show_default="the model that the package carries",
    ),
]
ScaleFactorOption = Annotated[
    int | None,
    typer.Option(
        "--scale-factor",
        metavar="S",
        help="Pack S x S patches into one token; tokens fall with S squared.",
        show_default="the model's own",
    ),
]
MaxImageTokensOption = Annotated[
    int | None,
    typer.Option(
        "--max-image-tokens",
        metavar="B",
        help="Use the largest tile grid whose exact token count fits B for each image.",
        show_default="no limit",
    ),
]
MaxTilesOption = Annotated[
    int | None,
    typer.Option("--max-tiles", metavar="N", help="Most tiles, without the thumbnail.", show_default="the model's own"),
]
MaxNewTokensOption = Annotated[
    int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Longest answer in tokens.")
]
MaxRejectsOption = Annotated[
    float, typer.Option("--max-rejects", metavar="SHARE", help="Share of rejected samples that is tolerated.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output; notes go to stderr.")
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="cpu, cuda, cuda:1, or auto to spread the model over all GPUs and the memory.",
        show_default="cuda where there is one",
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help="float32, float16, bfloat16, or 4bit (bitsandbytes) for the language model.",
        show_default="as stored",
    ),
]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show what the libraries have to say while loading.")
]
