"""What a data set holds and what a training run would leave out of it, without a model's weights."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tokenpacker.data.index import FIELDS, index_lengths
from tokenpacker.data.records import Records, open_records
from tokenpacker.data.rejects import Rejects
from tokenpacker.data.rows import RecordError
from tokenpacker.data.samples import SampleMaker
from tokenpacker.data.streams import TAR_ENDINGS, Stream, open_shards
from tokenpacker.visualize import ACCENT, FAINT_INK, INK, MARGIN, PAPER, RULE

NUM_BINS = 16
NUM_EXAMPLES = 3  # of each kind of reject
BAR_WIDTH = 40  # characters
CHART, CHART_HEIGHT, CHART_TOP = 640, 300, 150  # pixels


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Of one quantity over all usable samples."""

    total: int
    mean: float
    median: float
    p95: float
    max: int

    @classmethod
    def of(cls, values: np.ndarray) -> Numbers:
        """Zeros where there are no values."""
        if not len(values):
            return cls(total=0, mean=0.0, median=0.0, p95=0.0, max=0)
        return cls(
            total=int(values.sum()),
            mean=round(float(values.mean()), 2),
            median=float(np.median(values)),
            p95=float(np.percentile(values, 95)),
            max=int(values.max()),
        )


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What `tokenpacker data check` tells.

    Args:
        samples: looked at.
        usable: of these.
        with_images: usable ones with at least one; `multi_image` of these have several, `with_regions` marked regions.
        text_only: usable ones without.
        tokens: per usable sample, image tokens included.
        image_tokens: per usable sample with images, separators included.
        regions: per usable sample with regions.
        histogram: (from, to, samples) by tokens, both ends included.
        tiles: usable samples by number of tiles.
        rejected: samples left out, by kind.
        examples: of each kind (id, reason, source).
        max_share: rejected samples that are tolerated.
        decoded: whether images were decoded, or only their headers read.
    """

    samples: int
    usable: int
    with_images: int
    multi_image: int
    with_regions: int
    text_only: int
    tokens: Numbers
    image_tokens: Numbers
    regions: Numbers
    histogram: tuple[tuple[int, int, int], ...]
    tiles: dict[int, int]
    rejected: dict[str, int]
    examples: dict[str, list[tuple[str, str, str]]]
    max_share: float
    decoded: bool

    @property
    def rejected_share(self) -> float:
        """Of the samples looked at."""
        return (self.samples - self.usable) / self.samples if self.samples else 0.0

    @property
    def passes(self) -> bool:
        """Whether a training run would take the data: some are usable, and no more rejected than tolerated."""
        return self.usable > 0 and self.rejected_share <= self.max_share

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON."""
        keys = ("from", "to", "samples")
        return {
            **asdict(self),
            "histogram": [dict(zip(keys, bin, strict=True)) for bin in self.histogram],
            "tiles": {str(tiles): count for tiles, count in self.tiles.items()},
            "examples": {
                kind: [dict(zip(("id", "reason", "source"), example, strict=True)) for example in examples]
                for kind, examples in self.examples.items()
            },
            "rejected_share": self.rejected_share,
            "passes": self.passes,
        }


def open_data(
    data: Sequence[str | Path], images_root: str | Path | None = None, *, format: Any = None
) -> Records | Stream:
    """Records by number, or for tar shards a stream. Raises ValueError as `open_records` and `open_shards`."""
    if format is None and all(_holds_shards(Path(path)) for path in data):
        if images_root is not None:
            raise ValueError(
                f"images_root={images_root} has no use with tar shards, which hold their images; leave it out"
            )
        return open_shards(data)
    return open_records(data, images_root, format=format)


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
    """Everything about the data; never stops early, however much is rejected.

    Args:
        rejects: file that each reject is written to; an older one is replaced.
        num_samples: looks at this many, chosen by `seed`, or of a stream at the first ones; None looks at all.
        decode: decodes every image, so that files damaged behind their header are found.
        num_workers: see `index_lengths`; a stream is read by this process alone.

    Raises:
        ValueError: for a scale factor that the projector does not have, and limits below 1.
    """
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples={num_samples} must be at least 1")
    Rejects(None, max_share)  # checks the share before the work
    counted = Rejects(rejects, max_share=1.0, keep=False)
    if isinstance(data, Stream):
        maker.check_scale_factor(scale_factor)
        table, errors = _read_stream(data, maker, scale_factor, num_samples, decode, counted)
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
        rows = np.stack([getattr(lengths, name) for name in FIELDS])
        table, errors = rows[:, lengths.usable], list(lengths.errors.values())
    return _report(table, errors, max_share, decode)


def describe(report: DataReport) -> str:
    """The report as text, a histogram in it."""
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
        lines.append("images       headers read; --decode finds files that are damaged behind them")
    if report.usable:
        lines += [_numbers("tokens", report.tokens), *_bars(report)]
        lines.append(_numbers("image tokens", report.image_tokens))
        if report.with_regions:
            lines.append(f"{_numbers('regions', report.regions)}; {report.with_regions} samples have some")
        tiles = ", ".join(f"{tiles}: {count}" for tiles, count in report.tiles.items())
        lines.append(f"tiles        samples by number of tiles: {tiles}")
    return "\n".join(lines)


def draw_report(report: DataReport, title: str) -> Image.Image:
    """The histogram of tokens as a picture."""
    font = ImageFont.load_default
    page = Image.new("RGB", (CHART + 2 * MARGIN, CHART_TOP + CHART_HEIGHT + 2 * MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), title, INK, font(26))
    counts = f"{report.usable} samples: {report.with_images} with images, {report.text_only} text only"
    draw.text((MARGIN, MARGIN + 38), f"{counts}; {report.samples - report.usable} rejected", FAINT_INK, font(18))
    spread = f"median {report.tokens.median:g}, 95 % up to {report.tokens.p95:g}, longest {report.tokens.max}"
    draw.text((MARGIN, MARGIN + 64), f"tokens per sample: {spread}", FAINT_INK, font(18))
    bottom = CHART_TOP + CHART_HEIGHT
    draw.line((MARGIN, bottom, MARGIN + CHART, bottom), RULE, 2)
    highest = max((count for *_, count in report.histogram), default=1)
    step = CHART / max(1, len(report.histogram))
    for number, (first, last, count) in enumerate(report.histogram):
        left, right = MARGIN + number * step, MARGIN + (number + 1) * step - 4
        if count:
            height = max(2.0, (CHART_HEIGHT - 24) * count / highest)
            draw.rectangle((left, bottom - height, right, bottom - 1), fill=ACCENT)
            draw.text(((left + right) / 2, bottom - height - 3), _short(count), INK, font(13), anchor="mb")
        if number % 2 == 0 or len(report.histogram) <= NUM_BINS // 2:
            label = str(first) if first == last else f"{first}-{last}"
            draw.text(((left + right) / 2, bottom + 6), label, FAINT_INK, font(12), anchor="mt")
    return page


def _holds_shards(path: Path) -> bool:
    if path.is_dir():
        return any(entry.name.endswith(TAR_ENDINGS) for entry in path.iterdir())
    return path.name.endswith(TAR_ENDINGS)


def _read_stream(
    stream: Stream,
    maker: SampleMaker,
    scale_factor: int | None,
    num_samples: int | None,
    decode: bool,
    rejects: Rejects,
) -> tuple[np.ndarray, list[RecordError]]:
    """(5, usable samples) lengths as in `index`, and the errors."""
    errors: list[RecordError] = []

    def lengths() -> Iterator[tuple[int, ...]]:
        for position, record in islice(stream.stream(), num_samples):
            try:
                if isinstance(record, RecordError):
                    raise record
                length = maker.length(record, scale_factor)
                if decode:
                    maker.make(record, scale_factor)
            except RecordError as error:
                error.source = error.source or stream.where(position)
                errors.append(error)
                rejects.reject(error)
                continue
            rejects.accept()
            yield length.tokens, length.image_tokens, length.tiles, len(record.images), length.regions

    width = len(FIELDS)
    return np.fromiter(lengths(), dtype=np.dtype((np.int32, width))).reshape(-1, width).T, errors


def _report(table: np.ndarray, errors: Sequence[RecordError], max_share: float, decoded: bool) -> DataReport:
    tokens, image_tokens, tiles, images, regions = table
    kinds = Counter(error.kind for error in errors)
    examples: dict[str, list[tuple[str, str, str]]] = {kind: [] for kind, _ in kinds.most_common()}
    for error in errors:
        if len(examples[error.kind]) < NUM_EXAMPLES:
            examples[error.kind].append((error.id, error.reason, error.source))
    return DataReport(
        samples=len(tokens) + len(errors),
        usable=len(tokens),
        with_images=int((images > 0).sum()),
        multi_image=int((images > 1).sum()),
        with_regions=int((regions > 0).sum()),
        text_only=int((images == 0).sum()),
        tokens=Numbers.of(tokens),
        image_tokens=Numbers.of(image_tokens[images > 0]),
        regions=Numbers.of(regions[regions > 0]),
        histogram=_histogram(tokens),
        tiles=dict(sorted(Counter(tiles.tolist()).items())),
        rejected=dict(kinds.most_common()),
        examples=examples,
        max_share=max_share,
        decoded=decoded,
    )


def _histogram(tokens: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    """Bins of equal width, a whole number of tokens."""
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


def _short(count: int) -> str:
    return str(count) if count < 10_000 else f"{count / 1000:.0f}k"
