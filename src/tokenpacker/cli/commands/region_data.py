"""`tokenpacker data regions` and `data show`: public region annotations to training data, and a picture of a row."""

from pathlib import Path
from typing import Annotated

import typer

from tokenpacker.cli.arguments import require_existing
from tokenpacker.cli.errors import keeping
from tokenpacker.cli.options import JsonOption, MaxRejectsOption
from tokenpacker.cli.output import check_picture_suffix, print_json
from tokenpacker.progress import Progress

UNFIT = 1  # exit code where more is rejected than tolerated


def regions(
    format: Annotated[str, typer.Argument(metavar="FORMAT", help="Such as coco or osprey-short; `list` lists all.")],
    annotations: Annotated[
        Path | None, typer.Argument(metavar="ANNOTATIONS", help="Their file; for PascalPart's .mat files the folder.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option("--images", metavar="FOLDER", help="Where the images of these annotations lie.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE.jsonl", help="What training will read.")
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(
            "--root",
            metavar="FOLDER",
            help="What image paths are written relative to, one for all data sets of a run.",
            show_default="--images",
        ),
    ] = None,
    max_regions: Annotated[
        int | None,
        typer.Option("--max-regions", metavar="N", help="Most regions of a sample.", show_default="the format's"),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Decides which regions are taken, and the wording.")] = 0,
    split: Annotated[str, typer.Option("--split", help="Of RefCOCO's refs.")] = "train",
    instances: Annotated[
        Path | None,
        typer.Option(
            "--instances", metavar="FILE", help="COCO's file that RefCOCO's refs name.", show_default="beside the refs"
        ),
    ] = None,
    max_share: MaxRejectsOption = 0.01,
    as_json: JsonOption = False,
) -> None:
    """Make training data of public region annotations: a row for each image, questions with `<mask>` and answers.

    The file appears when it is whole; what was left out is named beside it, in FILE.jsonl.rejects.jsonl. Exit code 0:
    fit for training. 1: more is rejected than tolerated. 2: the annotations or an option cannot be used at all.

    Examples:

        tokenpacker data regions list

        tokenpacker data regions coco instances_train2017.json --images data/coco --root data --output coco.jsonl

        tokenpacker data regions vcr train.jsonl --images data/vcr1images --root data --output vcr.jsonl
    """
    check_share(max_share)
    if format != "list" or annotations is not None:
        if annotations is None or images is None or output is None:
            raise ValueError(
                "ANNOTATIONS, --images and --output are needed; `tokenpacker data regions --help` shows how"
            )
        require_existing("annotations", [annotations])
        require_existing("--images", [images])
    from tokenpacker.data.annotations import FORMATS, write_rows

    if annotations is None or images is None or output is None:
        told = {name: {"about": entry.about, "max_regions": entry.max_regions} for name, entry in FORMATS.items()}
        if as_json:
            print_json(told)
        else:
            for name, entry in told.items():
                typer.echo(f"{name:<20} {entry['max_regions']:>2} regions at most; {entry['about']}")
        return
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
    if as_json:
        print_json({**result.to_dict(), "output": str(output), "passes": fit})
    else:
        typer.echo(f"{result.rows:,} rows with {result.regions:,} regions in {output}")
        for kind, count in result.rejected.items():
            typer.echo(f"  {count:,} rejected: {kind}")
        if result.rejects is not None:
            typer.echo(f"{result.rejected_share:.2%} rejected, named in {result.rejects}")
    if not fit:
        raise typer.Exit(UNFIT)


def show_row(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="JSON, JSONL or Parquet file.")],
    out: Annotated[Path, typer.Option("--out", metavar="PAGE.png", help="Where the page is written.")],
    row: Annotated[int, typer.Option("--row", metavar="N", min=1, help="Which row, counted from 1.")] = 1,
    images: Annotated[
        Path | None,
        typer.Option("--images", metavar="FOLDER", help="Where image paths start.", show_default="the data's folder"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Draw a row of training data: its images, their regions numbered as in the text, and the conversation.

    Examples:

        tokenpacker data show coco.jsonl --images data --row 7 --out row.png
    """
    require_existing("data file", [data])
    check_picture_suffix(out, "--out")
    from tokenpacker.data.check import draw_record
    from tokenpacker.data.records import open_records

    records = open_records(data, images)
    if row > len(records):
        raise ValueError(f"--row {row} does not exist; {data} has the rows 1 to {len(records)}")
    page = draw_record(records[row - 1])
    out.parent.mkdir(parents=True, exist_ok=True)
    page.save(out)
    if as_json:
        print_json({"page": str(out), "row": row, "rows": len(records)})
    else:
        typer.echo(str(out))


def check_share(max_share: float) -> None:
    """Raises ValueError for a `--max-rejects` that is no share."""
    if not 0 <= max_share <= 1:
        raise ValueError(f"--max-rejects {max_share} must lie between 0 and 1, such as 0.01 for one in a hundred")
