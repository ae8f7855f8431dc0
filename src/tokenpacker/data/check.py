"""A report on a data set: what it holds, and what a run would leave out. Also draws a row. Loads no weights."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tokenpacker.data.index import Lengths, index_lengths, measure
from tokenpacker.data.labels import HUMAN
from tokenpacker.data.records import Records
from tokenpacker.data.rejects import Rejects
from tokenpacker.data.rows import Record, RecordError
from tokenpacker.data.samples import Length, SampleMaker
from tokenpacker.data.streams import Stream
from tokenpacker.hf.processing.llama_tokenizer import REGION_TOKEN
from tokenpacker.hf.processing.pictures import to_rgb
from tokenpacker.visualize import (
    ACCENT,
    FAINT_INK,
    INK,
    LARGE,
    MARGIN,
    MEDIUM,
    PAPER,
    RULE,
    SMALL,
    draw_conversation,
    shorten,
)

NUM_BINS = 16
NUM_EXAMPLES = 3  # of each kind of reject
BAR_WIDTH = 40  # characters
CHART, CHART_HEIGHT, CHART_TOP, CHART_FOOT = 880, 300, 170, 52  # pixels


class Numbers(NamedTuple):
    """Statistics of one quantity over usable samples; zeros if there are none."""

    total: int = 0
    mean: float = 0.0
    median: float = 0.0
    p95: float = 0.0
    max: int = 0

    @classmethod
    def of(cls, values: np.ndarray) -> Numbers:
        """The statistics of values."""
        if not len(values):
            return cls()
        mean, p95 = round(float(values.mean()), 2), float(np.percentile(values, 95))
        return cls(int(values.sum()), mean, float(np.median(values)), p95, int(values.max()))


class DataReport:
    """The report of `tokenpacker data check`.

    Args:
        lengths: lengths of the checked samples.
        max_share: share of samples that may be rejected.
        decoded: whether images were decoded; False if only their headers were read.

    Attributes:
        samples: number of checked samples; `usable` is the number of those that a run would use.
        with_images, text_only: usable samples with an image, and without. Of the former `multi_image` have several,
            `with_regions` have regions.
        tokens: per usable sample, image tokens included.
        image_tokens: per usable sample with images, separators included.
        regions: per usable sample with regions.
        histogram: (from, to, samples) by tokens, both ends included.
        tiles: usable samples by number of tiles.
        rejected: samples left out, by kind.
        examples: (id, reason, source) of some, by kind.
    """

    def __init__(self, lengths: Lengths, max_share: float, decoded: bool) -> None:
        usable = lengths.usable
        tokens, image_tokens, tiles, images, regions = (getattr(lengths, name)[usable] for name in Length._fields)
        self.samples, self.usable = len(lengths), len(usable)
        self.with_images, self.multi_image = int((images > 0).sum()), int((images > 1).sum())
        self.with_regions, self.text_only = int((regions > 0).sum()), int((images == 0).sum())
        self.tokens = Numbers.of(tokens)
        self.image_tokens = Numbers.of(image_tokens[images > 0])
        self.regions = Numbers.of(regions[regions > 0])
        self.histogram = _histogram(tokens)
        self.tiles = dict(sorted(Counter(tiles.tolist()).items()))
        self.rejected = dict(Counter(error.kind for error in lengths.errors.values()).most_common())
        self.examples: dict[str, list[tuple[str, str, str]]] = {kind: [] for kind in self.rejected}
        for error in lengths.errors.values():
            if len(self.examples[error.kind]) < NUM_EXAMPLES:
                self.examples[error.kind].append((error.id, error.reason, error.source))
        self.max_share, self.decoded = max_share, decoded

    @property
    def rejected_share(self) -> float:
        """Share of the samples that a run would leave out."""
        return (self.samples - self.usable) / self.samples if self.samples else 0.0

    @property
    def passes(self) -> bool:
        """Whether a training run would take the data: some samples are usable, and not too many are rejected."""
        return self.usable > 0 and self.rejected_share <= self.max_share

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON."""
        bins = [dict(zip(("from", "to", "samples"), bin, strict=True)) for bin in self.histogram]
        examples = {
            kind: [dict(zip(("id", "reason", "source"), example, strict=True)) for example in found]
            for kind, found in self.examples.items()
        }
        numbers = {name: getattr(self, name)._asdict() for name in ("tokens", "image_tokens", "regions")}
        tiles = {str(tiles): count for tiles, count in self.tiles.items()}
        shares = {"rejected_share": self.rejected_share, "passes": self.passes}
        return {**vars(self), **numbers, "histogram": bins, "tiles": tiles, "examples": examples, **shares}


def check_data(
    data: Records | Stream,
    maker: SampleMaker,
    *,
    scale_factor: int | None = None,
    rejects: str | Path | None = None,
    max_share: float = 0.01,
    num_samples: int | None = None,
    seed: int = 0,
    decode: bool = False,
    num_workers: int | None = None,
    progress: bool = False,
) -> DataReport:
    """Checks the data to the end, even if too much is rejected.

    Args:
        rejects: file for the rejects; replaces an older one.
        num_samples: to check, chosen by `seed`; of a stream, the first ones. None checks all.
        decode: decode every image, which finds files that are damaged after their header.
        num_workers: see `index_lengths`; a stream is read by this process alone.

    Raises:
        ValueError: if the projector lacks the scale factor, or a limit is below 1.
    """
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples={num_samples} must be at least 1")
    Rejects(None, max_share)  # checks the share before the work
    counted = Rejects(rejects, max_share=1.0, keep=False)
    if isinstance(data, Stream):
        maker.check_scale_factor(scale_factor)
        lengths = _stream_lengths(data, maker, scale_factor, num_samples, decode, counted)
    else:
        chosen = None
        if num_samples is not None and num_samples < len(data):
            chosen = sorted(random.Random(seed).sample(range(len(data)), num_samples))
        lengths = index_lengths(
            data,
            maker,
            scale_factor=scale_factor,
            rejects=counted,
            numbers=chosen,
            decode=decode,
            num_workers=num_workers,
            progress=progress,
        )
    return DataReport(lengths, max_share, decode)


def describe(report: DataReport) -> str:
    """The report as text, with a histogram."""
    share = f"{report.rejected_share:.2%}"
    lines = [
        f"samples      {report.samples}",
        f"usable       {report.usable}: {report.with_images} with images ({report.multi_image} with several),"
        f" {report.text_only} text only",
        f"rejected     {report.samples - report.usable} ({share}; at most {report.max_share:.2%} are tolerated)",
    ]
    for kind, count in report.rejected.items():
        lines.append(f"  {count} {kind}")
        lines += [f"    {id}: {reason}" for id, reason, _ in report.examples[kind]]
    if not report.decoded:
        lines.append("images       only headers were read; --decode also finds damage after the header")
    if report.usable:
        lines += [_numbers("tokens", report.tokens), *_bars(report)]
        lines.append(_numbers("image tokens", report.image_tokens))
        if report.with_regions:
            lines.append(f"{_numbers('regions', report.regions)}; {report.with_regions} samples have some")
        tiles = ", ".join(f"{tiles}: {count}" for tiles, count in report.tiles.items())
        lines.append(f"tiles        samples by number of tiles: {tiles}")
    return "\n".join(lines)


def draw_report(report: DataReport, title: str) -> Image.Image:
    """A picture of the histogram of tokens."""
    font = ImageFont.load_default
    page = Image.new("RGB", (CHART + 2 * MARGIN, CHART_TOP + CHART_HEIGHT + CHART_FOOT + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    counts = f"{report.usable:,} samples: {report.with_images:,} with images, {report.text_only:,} text only"
    spread = f"median {report.tokens.median:,.0f}, 95 % up to {report.tokens.p95:,.0f}, longest {report.tokens.max:,}"
    draw.text((MARGIN, MARGIN), shorten(title, LARGE, CHART), INK, font(LARGE))
    draw.text((MARGIN, MARGIN + 42), f"{counts}; {report.samples - report.usable:,} rejected", FAINT_INK, font(MEDIUM))
    draw.text((MARGIN, MARGIN + 74), f"tokens per sample: {spread}", FAINT_INK, font(MEDIUM))
    bottom = CHART_TOP + CHART_HEIGHT
    draw.line((MARGIN, bottom, MARGIN + CHART, bottom), RULE, 2)
    highest = max((count for *_, count in report.histogram), default=1)
    step = CHART / max(4, len(report.histogram))
    free = 0.0  # where the next label of the axis may begin
    for number, (first, last, count) in enumerate(report.histogram):
        left, right = MARGIN + number * step, MARGIN + (number + 1) * step - 4
        if count:
            height = max(3.0, (CHART_HEIGHT - 30) * count / highest)
            draw.rectangle((left, bottom - height, right, bottom - 1), fill=ACCENT)
            draw.text(((left + right) / 2, bottom - height - 4), _short(count), INK, font(SMALL), anchor="mb")
        label, middle = str(first) if first == last else f"{first}-{last}", (left + right) / 2
        half = font(SMALL).getlength(label) / 2
        if free <= middle - half and middle + half <= page.width:
            draw.text((middle, bottom + 8), label, FAINT_INK, font(SMALL), anchor="mt")
            free = middle + half + SMALL
    draw.text((MARGIN + CHART, bottom + CHART_FOOT), "tokens; over each bar its samples", FAINT_INK, font(SMALL), "rb")
    return page


def draw_record(record: Record) -> Image.Image:
    """A page with the images of a record, their regions numbered in the order of their marks, and the conversation.

    Raises:
        ValueError: if an image or a region cannot be used, with the number of the region, or if marks and regions
            differ in number.
    """
    marks = sum(message["value"].count(REGION_TOKEN) for message in record.conversation)
    num_regions = sum(map(len, record.regions))
    if marks != num_regions and record.regions:
        counts = f"{marks} {REGION_TOKEN} and {num_regions} regions"
        raise ValueError(f"{record.source or record.id} has {counts}; write as many of both")
    return draw_conversation(
        [to_rgb(image) for image in record.images],
        [(place, region) for place, own in enumerate(record.regions) for region in own],
        [(message["from"] == HUMAN, message["value"]) for message in record.conversation],
    )


def _stream_lengths(
    stream: Stream,
    maker: SampleMaker,
    scale_factor: int | None,
    num_samples: int | None,
    decode: bool,
    rejects: Rejects,
) -> Lengths:
    errors: dict[int, RecordError] = {}

    def lengths() -> Iterator[Length]:
        for number, (_, record) in enumerate(islice(stream.stream(), num_samples)):
            try:
                length = measure(record, maker, scale_factor, decode)
            except RecordError as error:
                errors[number] = error
                rejects.reject(error)
                length = Length(0, 0, 0, 0, 0)
            else:
                rejects.accept()
            yield length

    width = len(Length._fields)
    table = np.fromiter(lengths(), dtype=np.dtype((np.int32, width))).reshape(-1, width).T
    return Lengths(**dict(zip(Length._fields, table, strict=True)), errors=errors)


def _histogram(tokens: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    """Bins of equal width in whole tokens."""
    if not len(tokens):
        return ()
    first, last = int(tokens.min()), int(tokens.max())
    width = -(-(last - first + 1) // NUM_BINS)
    counts = np.bincount((tokens - first) // width)
    return tuple((first + bin * width, first + (bin + 1) * width - 1, int(n)) for bin, n in enumerate(counts))


def _bars(report: DataReport) -> Iterator[str]:
    highest = max(count for *_, count in report.histogram)
    for first, last, count in report.histogram:
        bar = "█" * -(-BAR_WIDTH * count // highest)  # rounded up: a single sample can be seen
        yield f"  {first:>6} - {last:<6} {count:>9}  {bar}".rstrip()


def _numbers(name: str, numbers: Numbers) -> str:
    spread = f"mean {numbers.mean:.1f}, median {numbers.median:g}, 95 % up to {numbers.p95:g}, longest {numbers.max}"
    return f"{name:<12} {numbers.total} in all; per sample: {spread}"


def _short(count: float) -> str:
    """The number in at most four characters."""
    for unit in ("", "k", "M"):
        if count < (10_000 if not unit else 999.5):
            return f"{count:.0f}{unit}"
        count /= 1000
    return f"{count:.0f}G"
