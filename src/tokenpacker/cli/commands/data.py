"""`tokenpacker data`: makes training data of annotations, and looks at it before a run does."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokenpacker.cli.arguments import require_existing
from tokenpacker.cli.commands.region_data import UNFIT, check_share, regions, show_row
from tokenpacker.cli.errors import keeping, reports_mistakes
from tokenpacker.cli.loading import find_model, quiet, read_json
from tokenpacker.cli.options import (
    JsonOption,
    MaxImageTokensOption,
    MaxRejectsOption,
    MaxTilesOption,
    ModelOption,
    ScaleFactorOption,
)
from tokenpacker.cli.output import check_picture_suffix, print_json, print_note

if TYPE_CHECKING:
    from tokenpacker.hf import TokenPackerProcessor

PROCESSOR_FILES = ["*.json", "*.jinja", "tokenizer.model"]

data_app = typer.Typer(help="Make training data of annotations, and look at it.", no_args_is_help=True)


@data_app.callback()
def _group() -> None:
    """Make training data of annotations, and look at it."""


data_app.command("regions")(reports_mistakes(regions))
data_app.command("show")(reports_mistakes(show_row))


@data_app.command()
@reports_mistakes
def check(
    data: Annotated[
        list[Path],
        typer.Argument(metavar="DATA...", help="JSON, JSONL or Parquet files, WebDataset tar shards, or a folder."),
    ],
    images: Annotated[
        Path | None,
        typer.Option(
            "--images",
            metavar="FOLDER",
            help="What image paths are relative to and may not lead out of.",
            show_default="each data file's folder",
        ),
    ] = None,
    model: ModelOption = None,
    released: Annotated[
        bool, typer.Option("--released", help="Cut images as the released HD models do, whose tokenizer is not needed.")
    ] = False,
    max_tiles: MaxTilesOption = None,
    scale_factor: ScaleFactorOption = None,
    max_image_tokens: MaxImageTokensOption = None,
    max_length: Annotated[
        int, typer.Option("--max-length", metavar="N", help="Longest sample in tokens; longer ones are rejected.")
    ] = 2048,
    captions: Annotated[
        bool, typer.Option("--captions", help="The plain format of stage 1, instead of conversations.")
    ] = False,
    with_regions: Annotated[
        bool, typer.Option("--regions", help="As a run that trains regions, if the model knows none yet.")
    ] = False,
    sample: Annotated[
        int | None, typer.Option("--sample", metavar="N", help="Look at N samples only.", show_default="all")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Decides which samples --sample takes.")] = 0,
    decode: Annotated[
        bool, typer.Option("--decode/--headers-only", help="Decode every image, or read its header only.")
    ] = False,
    max_share: MaxRejectsOption = 0.01,
    rejects: Annotated[
        Path, typer.Option("--rejects", metavar="FILE", help="Where rejected samples are written; replaced each time.")
    ] = Path("rejects.jsonl"),
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="PNG", help="Write the histogram of tokens as a picture.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", metavar="N", min=0, help="Processes.", show_default="one per core for much data"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check a data set as a training run would see it: counts, lengths, and what would be left out.

    No weights are loaded. Exit code 0: fit for training. 1: more is rejected than tolerated, or nothing is left.
    2: the data or an option cannot be used at all.

    Examples:

        tokenpacker data check llava_v1_5_mix665k.json --images data

        tokenpacker data check blip_laion_cc_sbu_558k.json --images images --captions --released --picture tokens.png

        tokenpacker data check stage2.jsonl --images data --regions --model runs/instruct-7b-hd9/model

        tokenpacker data check shards/*.tar --model runs/mine --decode --sample 2000 --json
    """
    check_share(max_share)
    require_existing("data file", data)
    if picture is not None:
        check_picture_suffix(picture, "--picture")
    processor = _processor(model, released)
    from tokenpacker.data.check import check_data, describe, draw_report
    from tokenpacker.data.samples import SampleMaker
    from tokenpacker.data.sources import open_data

    if max_tiles is not None:
        from tokenpacker.tiling import tile_grids

        tile_grids(max_tiles, processor.image_processor.grid_list)  # refuses what it cannot list
        processor.image_processor.max_tiles = max_tiles
    if with_regions:
        from tokenpacker.train.assemble import knowing_regions

        processor = knowing_regions(processor)
    maker = SampleMaker(processor, "plain" if captions else "v1", max_length, max_image_tokens=max_image_tokens)
    with keeping("nothing but the rejects so far is kept; call it again, with --sample N for a quicker look"):
        report = check_data(
            open_data(data, images),
            maker,
            scale_factor=scale_factor,
            rejects=rejects,
            max_share=max_share,
            num_samples=sample,
            seed=seed,
            decode=decode,
            num_workers=workers,
            progress=True,
        )
    written = str(rejects) if report.rejected else None
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw_report(report, ", ".join(path.name for path in data[:3])).save(picture)
    if as_json:
        print_json({**report.to_dict(), "rejects_file": written, "picture": str(picture) if picture else None})
    else:
        typer.echo(describe(report))
        for name, path in (("rejects", written), ("picture", picture)):
            if path is not None:
                typer.echo(f"{name:<12} {path}")
    if not report.passes:
        raise typer.Exit(UNFIT)


def _processor(model: str | None, released: bool) -> "TokenPackerProcessor":
    """The model's processor, or the released geometry. Raises ValueError for both, and as `find_model`."""
    if released and model is not None:
        raise ValueError("--released and --model exclude each other; leave one out")
    folder = find_model(model, PROCESSOR_FILES)
    read_json(folder / "processor_config.json")
    with quiet():
        from tokenpacker.hf import TokenPackerProcessor
        from tokenpacker.hf.processing.image_processor import RELEASED_OPTIONS, TokenPackerImageProcessor

        try:
            processor = TokenPackerProcessor.from_pretrained(folder)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"the processor in {folder} cannot be loaded ({reason}); fetch the model anew") from error
    if not released:
        return processor
    print_note("note: texts are counted with the carried model's tokenizer, not with LLaMA's; images are exact")
    return TokenPackerProcessor(
        TokenPackerImageProcessor(max_tiles=9, **RELEASED_OPTIONS), processor.tokenizer, row_separator="unknown"
    )
