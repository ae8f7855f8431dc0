"""Writes the rows of annotations to a file, whole or not at all, and what was left out to a file beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenpacker.data.annotations import coco, osprey, part_datasets, refcoco, vcr, visual_genome, wording
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
        max_regions: default for the most regions of a sample.
        about: one line for a list of formats.
    """

    read: Callable[[Source], Rows]
    max_regions: int
    about: str


SHORT_CONVERSATIONS = partial(osprey.read_conversations, form=wording.SHORT_FORM)
# The numbers of regions are those of the original's own readers: 20 for COCO, 15 for RefCOCO and parts, 3 for Visual
# Genome. VCR and Osprey-724K have no limit there; 20 is ours.
FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "coco": Format(coco.read_instances, 20, "COCO instances: name the category"),
        "refcoco": Format(
            partial(refcoco.read_refcoco, wordings=wording.REFER),
            15,
            "RefCOCO and RefCOCOg: refer to it, place included",
        ),
        "refcoco+": Format(
            partial(refcoco.read_refcoco, wordings=wording.REFER_BY_LOOKS), 15, "RefCOCO+: refer to it by its looks"
        ),
        "pascal-part": Format(part_datasets.read_pascal_part, 15, "PascalPart: object and part"),
        "part-imagenet": Format(part_datasets.read_part_imagenet, 15, "PartImageNet: object and part"),
        "visual-genome": Format(visual_genome.read_visual_genome, 3, "Visual Genome: a short phrase"),
        "vcr": Format(vcr.read_vcr, 20, "VCR: answer, then reason"),
        "osprey-short": Format(SHORT_CONVERSATIONS, 20, "Osprey-724K, short form"),
        "osprey-posneg": Format(osprey.read_positive_negative, 20, "Osprey-724K, LVIS positive and negative"),
        "osprey-conversation": Format(osprey.read_conversations, 20, "Osprey-724K, conversations"),
        "osprey-detail": Format(osprey.read_descriptions, 20, "Osprey-724K, detailed descriptions"),
        "osprey-part": Format(SHORT_CONVERSATIONS, 20, "Osprey-724K, part level"),
    }
)


@dataclass
class Conversion:
    """Counts of what was written and left out.

    Args:
        rows: written.
        regions: in these rows.
        rejected: images, regions and lines left out, by kind.
        rejects: the file that names them; None if there are none.
    """

    rows: int = 0
    regions: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    rejects: Path | None = None

    @property
    def rejected_share(self) -> float:
        """Rejects per region and reject."""
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
    """Writes the rows of some annotations to `output`, which appears when it is complete.

    The same annotations, options and seed give the same file. Rejects go to a file beside it.

    Args:
        format: one of `FORMATS`.
        annotations: file, or folder of the formats that have one file for each image.
        images: folder of the images.
        output: JSONL file; an older one is replaced.
        root: folder that image paths are written relative to, so that files of several data sets can be joined; None
            is `images`.
        max_regions: most regions of a sample; None takes the format's.
        split, instances: see `Source`.
        progress: takes the counts so far, now and then.

    Raises:
        ValueError: for an unknown format, a missing file or folder, and a file that as a whole has another form.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown; use one of {', '.join(FORMATS)}")
    source = Source(
        annotations=Path(annotations),
        images=Path(images),
        root=Path(images if root is None else root),
        max_regions=FORMATS[format].max_regions if max_regions is None else max_regions,
        seed=seed,
        split=split,
        instances=None if instances is None else Path(instances),
    )
    output = Path(output)
    unfinished = output.with_name(f"{output.name}.partial")
    result = Conversion(rejects=output.with_name(output.name + REJECTS_ENDING))
    rejects = Rejects(result.rejects, max_share=1.0, keep=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with unfinished.open("w", encoding="utf-8", errors="replace") as file:
            for row in FORMATS[format].read(source):
                if isinstance(row, RecordError):
                    rejects.reject(row)
                    result.rejected = dict(rejects.counts.most_common())
                else:
                    row = {**row, "id": f"{format}/{row['id']}"}  # ids differ between formats in one file
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    result.rows += 1
                    result.regions += sum(len(regions) for regions in row["regions"])
                if not (result.rows + rejects.num_rejected) % TOLD_EVERY:
                    progress(result)
        if not result.rows:
            raise ValueError(_nothing(source, format, rejects))
        os.replace(unfinished, output)
    finally:
        unfinished.unlink(missing_ok=True)
    if not rejects.num_rejected:
        result.rejects = None
    return result


def _nothing(source: Source, format: str, rejects: Rejects) -> str:
    """Says why there is no row, with the reason of the first reject."""
    if not rejects.num_rejected or rejects.path is None:
        return f"{source.annotations} holds nothing to read as {format}; check the format's name"
    first = json.loads(rejects.path.read_text(encoding="utf-8").splitlines()[0])
    return (
        f"{source.annotations} gives no row as {format}: all {rejects.num_rejected} are rejected, the first because"
        f" {first['reason']}; see {rejects.path}"
    )
