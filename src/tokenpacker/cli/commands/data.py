"""`tokenpacker data`: fetches data, makes training data of annotations, and looks at it before a run does."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument

from tokenpacker.cli import options
from tokenpacker.cli.arguments import exclude, picture_file
from tokenpacker.cli.command_group import CommandGroup
from tokenpacker.cli.commands.data_get import get
from tokenpacker.cli.errors import keeping
from tokenpacker.cli.known_names import format_name
from tokenpacker.cli.loading import load_processor
from tokenpacker.cli.model_files import PROCESSOR_FILES, find_model
from tokenpacker.cli.options import MORE, flag, number, value
from tokenpacker.cli.output import print_note, print_result
from tokenpacker.progress import Progress

if TYPE_CHECKING:
    from tokenpacker.hf import TokenPackerProcessor

UNFIT = 1  # exit code if more is rejected than tolerated

data_app = typer.Typer(help="Fetch data, make it of annotations, and check it.", no_args_is_help=True, cls=CommandGroup)
data_app.command()(get)


@data_app.command()
def check(
    data: Annotated[
        list[Path], Argument(metavar="DATA", exists=True, help="JSON, JSONL, Parquet, tar shards, or a folder.")
    ],
    images: options.Images = None,
    model: options.Model = None,
    captions: Annotated[bool, flag("--captions", "As stage 1 reads it: captions, plain format.")] = False,
    with_regions: Annotated[bool, flag("--regions", "Add regions to a model that has none.")] = False,
    max_share: options.MaxRejects = 0.01,
    rejects: Annotated[Path, value("FILE", "Where rejected samples go.")] = Path("rejects.jsonl"),
    picture: Annotated[Path | None, value("PNG", "Where a histogram of tokens goes.", callback=picture_file)] = None,
    sample: Annotated[int | None, number("Look at N samples only.", "all", MORE)] = None,
    seed: options.Seed = 0,
    decode: Annotated[bool, flag("--decode/--headers-only", "Decode all images.", MORE)] = False,
    released: Annotated[bool, flag("--released", "Cut images as the released HD models do.")] = False,
    max_tiles: options.MaxTiles = None,
    scale_factor: options.ScaleFactor = None,
    max_image_tokens: options.MaxImageTokens = None,
    max_length: Annotated[int, number("Longest sample in tokens.", panel=MORE)] = 2048,
    workers: Annotated[int | None, number("Processes.", "one a core", MORE, least=0)] = None,
    as_json: options.Json = False,
) -> None:
    """Check data as a training run would see it: counts, lengths, and what would be left out.

    Exit code 0: fit for training. 1: too many samples are rejected. 2: the data cannot be read.

    Examples:
        tokenpacker data check llava_v1_5_mix665k.json --images data
        tokenpacker data check blip_laion_cc_sbu_558k.json --images images --captions --picture tokens.png
        tokenpacker data check stage2.jsonl --images data --regions --model runs/instruct-7b-hd9/model
    """
    processor = _processor(model, released, max_tiles, with_regions)
    from tokenpacker.data.check import check_data, describe, draw_report
    from tokenpacker.data.samples import SampleMaker
    from tokenpacker.data.sources import open_data

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
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw_report(report, ", ".join(path.name for path in data[:3])).save(picture)
    files = {"rejects_file": str(rejects) if report.rejected else None, "picture": picture and str(picture)}
    lines = [f"{name.removesuffix('_file'):<12} {path}" for name, path in files.items() if path]
    print_result(as_json, {**report.to_dict(), **files}, "\n".join([describe(report), *lines]))
    if not report.passes:
        raise typer.Exit(UNFIT)


def _processor(model: str | None, released: bool, max_tiles: int | None, regions: bool) -> "TokenPackerProcessor":
    """The model's processor with the options put in. Raises ValueError for a model that is not found."""
    exclude({"--released": released, "--model": model})
    processor = load_processor(find_model(model, PROCESSOR_FILES))
    if released:
        from tokenpacker.hf import RELEASED_OPTIONS, TokenPackerImageProcessor, TokenPackerProcessor

        print_note("note: texts are counted with the carried model's tokenizer, not with LLaMA's; images are exact")
        images = TokenPackerImageProcessor(max_tiles=9, **RELEASED_OPTIONS)
        processor = TokenPackerProcessor(images, processor.tokenizer, row_separator="unknown")
    if max_tiles is not None:
        from tokenpacker.tiling import tile_grids

        tile_grids(max_tiles, processor.image_processor.grid_list)  # raises if it has no such grids
        processor.image_processor.max_tiles = max_tiles
    if regions:
        from tokenpacker.train.assemble import knowing_regions

        processor = knowing_regions(processor)
    return processor


@data_app.command()
def regions(
    format: Annotated[str, Argument(metavar="FORMAT", callback=format_name, help="coco, osprey-short, ...; or list.")],
    annotations: Annotated[
        Path | None,
        Argument(metavar="ANNOTATIONS", exists=True, help="Their file; for PascalPart the folder of .mat files."),
    ] = None,
    images: Annotated[Path | None, value("FOLDER", "Folder of these images.", exists=True)] = None,
    output: Annotated[Path | None, value("FILE.jsonl", "What training will read.")] = None,
    root: Annotated[Path | None, value("FOLDER", "Where image paths are to start.", "--images")] = None,
    max_regions: Annotated[int | None, number("Most regions of a sample.", "the format's")] = None,
    max_share: options.MaxRejects = 0.01,
    seed: options.Seed = 0,
    split: Annotated[str, value("NAME", "Split of RefCOCO's refs.")] = "train",
    instances: Annotated[Path | None, value("FILE", "COCO's file for RefCOCO.", "beside the refs")] = None,
    as_json: options.Json = False,
) -> None:
    """Make training data of region annotations: questions with `<mask>`, and answers.

    The file appears when it is complete; FILE.jsonl.rejects.jsonl names what was left out.
    Exit code 0: fit for training. 1: too many samples are rejected. 2: the annotations cannot be used.

    Examples:
        tokenpacker data regions list
        tokenpacker data regions coco instances_train2017.json --images data/coco --root data --output coco.jsonl
    """
    if format == "list" and annotations is None:
        _list_formats(as_json)
        return
    if annotations is None or images is None or output is None:
        raise ValueError("ANNOTATIONS, --images and --output are needed; `tokenpacker data regions --help` shows how")
    from tokenpacker.data.annotations import write_rows

    with keeping(f"{output} was not written; call it again to start anew"), Progress("rows") as shown:
        result = write_rows(
            format,
            annotations,
            images,
            output,
            root=root,
            max_regions=max_regions,
            seed=seed,
            split=split,
            instances=instances,
            progress=lambda so_far: shown.update(
                so_far.rows, f"{so_far.regions:,} regions, {sum(so_far.rejected.values()):,} rejected"
            ),
        )
    fit = result.rejected_share <= max_share
    lines = [f"{result.rows:,} rows with {result.regions:,} regions in {output}"]
    lines += [f"  {count:,} rejected: {kind}" for kind, count in result.rejected.items()]
    if result.rejects is not None:
        lines.append(f"{result.rejected_share:.2%} rejected, named in {result.rejects}")
    print_result(as_json, {**result.to_dict(), "output": str(output), "passes": fit}, "\n".join(lines))
    if not fit:
        raise typer.Exit(UNFIT)


def _list_formats(as_json: bool) -> None:
    from tokenpacker.data.annotations import FORMATS

    formats = {name: {"about": entry.about, "max_regions": entry.max_regions} for name, entry in FORMATS.items()}
    lines = [f"{name:<20} {one['max_regions']:>2} regions at most; {one['about']}" for name, one in formats.items()]
    print_result(as_json, formats, "\n".join(lines))


@data_app.command()
def show(
    data: Annotated[Path, Argument(metavar="DATA", exists=True, help="JSON, JSONL or Parquet file.")],
    out: options.Page,
    row: Annotated[int, number("Which row, counted from 1.")] = 1,
    images: options.Images = None,
    as_json: options.Json = False,
) -> None:
    """Draw a row of training data: its images, numbered regions and conversation.

    Examples:
        tokenpacker data show coco.jsonl --images data --row 7 --out row.png
    """
    from tokenpacker.data.check import draw_record
    from tokenpacker.data.records import open_records

    records = open_records(data, images)
    if row > len(records):
        raise ValueError(f"--row {row} does not exist; {data} has the rows 1 to {len(records)}")
    page = draw_record(records[row - 1])
    out.parent.mkdir(parents=True, exist_ok=True)
    page.save(out)
    print_result(as_json, {"page": str(out), "row": row, "rows": len(records)}, str(out))
