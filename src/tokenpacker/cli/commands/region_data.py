"""`tokenpacker data regions` and `data show`: public region annotations to training data, and a picture of a row."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument

from tokenpacker.cli import options
from tokenpacker.cli.errors import keeping
from tokenpacker.cli.known_names import format_name
from tokenpacker.cli.options import number, value
from tokenpacker.cli.output import print_result
from tokenpacker.progress import Progress

UNFIT = 1  # exit code if more is rejected than tolerated


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


def show_row(
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
