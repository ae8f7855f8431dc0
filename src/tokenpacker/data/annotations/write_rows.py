"""Annotations of a named format to a file of rows: all of it or nothing, with what was left out beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenpacker.data.annotations import coco, osprey, refcoco, vcr, visual_genome
from tokenpacker.data.annotations import part_datasets as parts
from tokenpacker.data.annotations.reader import Rows, Source
from tokenpacker.data.rejects import Rejects
from tokenpacker.data.rows import RecordError

REJECTS_ENDING = ".rejects.jsonl"
TOLD_EVERY = 1000  # rows


@dataclass(frozen=True)
class Format:
    """A format of annotations.

    Args:
        read: gives its rows.
        max_regions: most regions of a sample unless told otherwise.
        about: what it is, for a list.
    """

    read: Callable[[Source], Rows]
    max_regions: int
    about: str


# The numbers of regions are those of the original's own readers: 20 for COCO, 15 for RefCOCO and parts, 3 for Visual
# Genome. VCR and Osprey-724K have no limit there; 20 is ours.
FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "coco": Format(coco.read_instances, 20, "COCO instances: name the category"),
        "refcoco": Format(refcoco.read_refcoco, 15, "RefCOCO and RefCOCOg: refer to it, place included"),
        "refcoco+": Format(refcoco.read_refcoco_plus, 15, "RefCOCO+: refer to it by its looks"),
        "pascal-part": Format(parts.read_pascal_part, 15, "PascalPart: object and part"),
        "part-imagenet": Format(parts.read_part_imagenet, 15, "PartImageNet: object and part"),
        "visual-genome": Format(visual_genome.read_visual_genome, 3, "Visual Genome: a short phrase"),
        "vcr": Format(vcr.read_vcr, 20, "VCR: answer, then reason"),
        "osprey-short": Format(osprey.read_short_form, 20, "Osprey-724K, short form"),
        "osprey-posneg": Format(osprey.read_positive_negative, 20, "Osprey-724K, LVIS positive and negative"),
        "osprey-conversation": Format(osprey.read_conversation, 20, "Osprey-724K, conversations"),
        "osprey-detail": Format(osprey.read_detailed_description, 20, "Osprey-724K, detailed descriptions"),
        "osprey-part": Format(osprey.read_part_level, 20, "Osprey-724K, part level"),
    }
)


@dataclass
class Conversion:
    """What became of a file of annotations.

    Args:
        rows: written.
        regions: in these.
        rejected: images, regions and lines left out, by kind.
        rejects: the file that names them; None where there are none.
    """

    rows: int = 0
    regions: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    rejects: Path | None = None

    @property
    def rejected_share(self) -> float:
        """Of regions and rejects together."""
        total = self.regions + sum(self.rejected.values())
        return sum(self.rejected.values()) / total if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "rows": self.rows,
            "regions": self.regions,
            "rejected": self.rejected,
            "rejected_share": self.rejected_share,
            "rejects": None if self.rejects is None else str(self.rejects),
        }


def write_rows(
    format: str,
    annotations: str | Path,
    images: str | Path,
    output: str | Path,
    *,
    root: str | Path | None = None,
    max_regions: int | None = None,
    seed: int = 0,
    split: str = "train",
    instances: str | Path | None = None,
    progress: Callable[[Conversion], None] = lambda _: None,
) -> Conversion:
    """Writes the rows of some annotations to `output`, which appears when it is whole.

    The same annotations, options and seed give the same file. Rejects go to a file beside it.

    Args:
        format: one of `FORMATS`.
        annotations: file, or folder of the formats that have one file for each image.
        images: folder of the images.
        output: JSONL file; an older one is replaced.
        root: folder that image paths are written relative to, for files of several data sets to be put together; None
            is `images`.
        max_regions: most regions of a sample; None takes the format's.
        split, instances: see `Source`.
        progress: is told now and then how far it is.

    Raises:
        ValueError: for an unknown format, a missing file or folder, and a file that as a whole has another form.
    """
    source, output = _source(format, annotations, images, root, max_regions, seed, split, instances), Path(output)
    partial = output.with_name(f"{output.name}.partial")
    result = Conversion(rejects=output.with_name(output.name + REJECTS_ENDING))
    rejects = Rejects(result.rejects, max_share=1.0, keep=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("w", encoding="utf-8", errors="replace") as file:
            for row in FORMATS[format].read(source):
                _count(row, result, rejects)
                if not isinstance(row, RecordError):
                    row = {**row, "id": f"{format}/{row['id']}"}  # of many formats in one file each has its own
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                if not (result.rows + rejects.num_rejected) % TOLD_EVERY:
                    progress(result)
        if not result.rows:
            raise ValueError(_nothing(source, format, rejects))
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
    if not rejects.num_rejected:
        result.rejects = None
    return result


def _source(
    format: str,
    annotations: str | Path,
    images: str | Path,
    root: str | Path | None,
    max_regions: int | None,
    seed: int,
    split: str,
    instances: str | Path | None,
) -> Source:
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown; use one of {', '.join(FORMATS)}")
    if max_regions is not None and max_regions < 1:
        raise ValueError(f"max_regions={max_regions} must be at least 1")
    for name, folder in (("images", images), ("root", root)):
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"{name}={folder} is no folder; check the path")
    folders = [Path(os.path.abspath(folder)) for folder in (images, images if root is None else root)]
    if not folders[0].is_relative_to(folders[1]):
        raise ValueError(f"images={images} lies outside root={root}, which rows start from; choose a root above it")
    if not Path(annotations).exists():
        raise ValueError(f"annotations {annotations} do not exist; check the path")
    return Source(
        annotations=Path(annotations),
        images=folders[0],
        root=folders[1],
        max_regions=FORMATS[format].max_regions if max_regions is None else max_regions,
        seed=seed,
        split=split,
        instances=None if instances is None else Path(instances),
    )


def _count(row: dict[str, Any] | RecordError, result: Conversion, rejects: Rejects) -> None:
    if isinstance(row, RecordError):
        rejects.reject(row)
        result.rejected = dict(rejects.counts.most_common())
        return
    rejects.accept()
    result.rows += 1
    result.regions += sum(len(regions) for regions in row["regions"])


def _nothing(source: Source, format: str, rejects: Rejects) -> str:
    """Why there is no row, by what was said of the first reject."""
    if not rejects.num_rejected or rejects.path is None:
        return f"{source.annotations} holds nothing to read as {format}; check the format's name"
    first = json.loads(rejects.path.read_text(encoding="utf-8").splitlines()[0])
    return (
        f"{source.annotations} gives no row as {format}: all {rejects.num_rejected} are rejected, the first because"
        f" {first['reason']}; see {rejects.path}"
    )
