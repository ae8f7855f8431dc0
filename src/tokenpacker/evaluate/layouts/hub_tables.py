"""Readers of lmms-eval's data sets: Parquet files in a folder, or the hub.

A folder of data holds a copy of the hub's repository, as `tokenpacker data get pope --to DIR` or `git clone` makes it,
under the repository's or the benchmark's name in any case: `DIR/POPE/data/test-00000-of-00003.parquet`,
`DIR/pope/data/...` or `DIR/lmms-lab-encoder/POPE/data/...`. DIR may also be that copy. Images stay in memory-mapped
files until they are asked for; the datasets library makes these from the Parquet files, once, in its cache.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

from tokenpacker.data.hub_files import hub_errors, read_record
from tokenpacker.evaluate.bench_question import BenchQuestion, StoredImage
from tokenpacker.evaluate.layouts.loaded import Loaded, Problem, broken_question, gather
from tokenpacker.evaluate.layouts.table_columns import TABLES, Row, Table
from tokenpacker.hub import hub_problem

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 1000  # read at once
MAGIC = b"PAR1"  # begins and ends each Parquet file
SHARD = re.compile(r"-\d+-of-(\d+)")


def load_table(name: str, folder: Path, split: str | None = None) -> Loaded | None:
    """The questions of a benchmark from Parquet files; None if the folder has no copy of its data set.

    Args:
        split: None takes the benchmark's default, of which answers are public.

    Raises:
        ValueError: for an unknown split, and files that are incomplete, damaged or have other columns.
        ImportError: without datasets.
    """
    table = TABLES.get(name)
    copy = None if table is None else _copy_in(Path(folder), table)
    if table is None or copy is None:
        return None
    split = table.find_split(split)
    record = read_record(copy)
    source = f"{copy} ({record['repository']}@{record['revision']})" if record else str(copy)
    remedy = f"`tokenpacker data get {name} --split {split} --to {copy.parent}` fetches what is missing"
    return _load(table, split, copy, source, remedy)


def load_hub(name: str, split: str | None = None) -> Loaded:
    """The questions of a benchmark from the hub's data set. huggingface_hub keeps the split's files in its cache.

    Raises:
        ValueError: for a benchmark without a data set, an unknown split, a hub that cannot be reached for files that
            are not in the cache, and as `load_table`.
        ImportError: without datasets.
    """
    from huggingface_hub import snapshot_download

    if name not in TABLES:
        raise ValueError(f"benchmark {name!r} has no data set on the hub; use one of: {', '.join(TABLES)}")
    table = TABLES[name]
    split = table.find_split(split)
    _datasets()
    remedy = f"fetch it with `tokenpacker data get {name} --to DIR` where there is a network, and give --data DIR here"
    with hub_errors(table.repository, remedy, problem := hub_problem()):
        copy = snapshot_download(
            table.repository,
            repo_type="dataset",
            allow_patterns=table.files(split),
            local_files_only=problem is not None,
        )
    return _load(table, split, Path(copy), f"{table.repository}@{Path(copy).name}", remedy)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise ImportError("lmms-eval's data sets need datasets; run: pip install 'tokenpacker[evaluate]'") from None
    return datasets


def _copy_in(folder: Path, table: Table) -> Path | None:
    """The folder with Parquet files that has the name of the repository or the benchmark."""
    owner, _, repository = table.repository.lower().partition("/")
    folders = [folder]
    for parent in (folder, *folder.glob("*")):
        if parent.is_dir() and (parent == folder or parent.name.lower() == owner):
            folders += sorted(parent.iterdir())
    names = (repository, table.benchmark)
    return next((one for one in folders if one.name.lower() in names and any(one.glob("*/*.parquet"))), None)


def _files(copy: Path, pattern: str, remedy: str) -> list[Path]:
    """The files of a pattern. Raises ValueError if there are none, some are missing, or one is no Parquet file."""
    found = sorted(copy.glob(pattern))
    if not found:
        raise ValueError(f"{copy} has no {pattern}; {remedy}")
    counted = SHARD.search(found[0].name)
    if counted and len(found) != int(counted[1]):
        raise ValueError(f"{copy} has {len(found)} of {int(counted[1])} files {pattern}; {remedy}")
    for path in found:
        with path.open("rb") as file:
            whole = file.read(4) == MAGIC and file.seek(-4, 2) and file.read() == MAGIC
        if not whole:
            raise ValueError(f"{path} is no whole Parquet file (cut off, or a pointer of git LFS); {remedy}")
    return found


def _read_files(files: Sequence[Path]) -> pa.Table:
    """The files as one memory-mapped table."""
    datasets = _datasets()
    try:
        loaded = datasets.load_dataset("parquet", data_files=[str(path) for path in files], split="train")
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{files[0]} cannot be read ({_one_line(error.__cause__ or error)}); fetch it anew") from None
    return loaded.with_format("arrow")[:]


def _load(table: Table, split: str, copy: Path, source: str, remedy: str) -> Loaded:
    """The questions of a split. `remedy` ends the message about files that are not whole."""
    parts = [_read_files(_files(copy, pattern, remedy)) for pattern in table.files(split)]
    rows, images = parts[0], parts[-1]
    for part, columns in ((rows, table.columns), (images, table.images)):
        if missing := [name for name in columns if name not in part.column_names]:
            raise ValueError(
                f"{source} has no column {', '.join(missing)} but {', '.join(part.column_names)}; {table.benchmark}"
                f" needs those of {table.repository}"
            )
    reader = _Reader(table, split, images)
    questions: list[BenchQuestion] = []
    problems: list[Problem] = []
    texts = rows.select([name for name in rows.column_names if name not in table.images])
    for start in range(0, len(texts), ROWS):
        for number, row in enumerate(texts.slice(start, ROWS).to_pylist(), start + 1):
            found = list(reader.read({**row, "#": number}))
            questions += [question for question, _ in found]
            problems += [problem for _, problem in found if problem is not None]
    problems += _check_answers(table, questions)
    return gather(questions, problems, source=source, split=split)


class _Missing(ValueError):
    """An image that a question needs is not there."""


@dataclass
class _Reader:
    """Makes the questions of a row.

    Args:
        images: the rows' images; or those of another configuration, by `id`.
    """

    table: Table
    split: str
    images: pa.Table

    def __post_init__(self) -> None:
        self.columns = [self.images.column(name) for name in self.table.images]
        ids = self.images.column("id").to_pylist() if self.table.image_config else ()
        self.places: Mapping[Any, int] = {id: place for place, id in enumerate(ids)}

    def read(self, row: Row) -> Iterator[tuple[BenchQuestion, Problem | None]]:
        """The questions of a row. One that cannot be asked comes with its problem."""
        where, each = f"{self.table.benchmark} {self.split}, row {row['#']}", self.table.each
        if each is None:
            entries = {where: row}
        else:
            texts = enumerate(row[each] or [None], 1)
            entries = {f"{where}, text {n}": {**row, each: text, "#entry": n} for n, text in texts}
        for place, entry in entries.items():
            try:
                yield self._question(entry)
            except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:  # noqa: PERF203
                yield broken_question(place, _one_line(error))

    def _question(self, row: Row) -> tuple[BenchQuestion, Problem | None]:
        """Raises ValueError or another error of Python for a malformed row."""
        table = self.table
        problem: str | None = None
        images: tuple[StoredImage, ...] = ()
        try:
            images = tuple(self._stored(row))
            if table.boxes:
                row = {**row, "#size": _size(images[0])}
        except _Missing as missing:
            if table.boxes:
                raise
            problem = str(missing)
        id, text = table.id(row), row[table.text]
        if id is None or not isinstance(text, str) or not text.strip():
            raise ValueError(f"id={id!r} and {table.text}={text!r} must not be empty")
        extra = {name: value for name, read in table.extra.items() if (value := read(row)) is not None}
        options = _texts("options", table.options(row)) if table.options else ()
        answers = _texts("answer", table.answers(row))
        if options:
            extra["options"] = options
            if unknown := [answer for answer in answers if answer not in tuple(ascii_uppercase[: len(options)])]:
                raise ValueError(f"answer={unknown[0]!r} is no letter of the {len(options)} options")
        if problem is not None:
            extra["problem"] = problem
        question = BenchQuestion(id=str(id), text=text, images=images, answers=answers, extra=extra)
        return question, None if problem is None else Problem("missing image", question.id, problem)

    def _stored(self, row: Row) -> Iterator[StoredImage]:
        """The images of a question, not decoded. Raises _Missing."""
        table = self.table
        shown = table.images if table.shown is None else table.shown(row)
        place = self.places.get(row["imageId"]) if table.image_config else row["#"] - 1
        if place is None:
            raise _Missing(f"the image {row['imageId']} is missing")
        identity, count = table.image_id(row), 0
        for name in shown:
            cell = self.columns[table.images.index(name)][place]
            encoded = _encoded(cell)
            if (table.shown and not encoded) or not all(one.is_valid for one in encoded):
                raise _Missing(f"the column {name} has no image")
            for one in encoded:
                count += 1
                key = f"{table.repository}/{identity}" + (f"/{count}" if count > 1 else "")
                yield StoredImage(hashlib.sha256(one.as_buffer()).hexdigest() if identity is None else key, one.as_py)
        if not count and table.needs_image:
            raise _Missing("the row has no image")


def _encoded(cell: Any) -> list[Any]:
    """The files of a cell's image, or list of images, as Arrow values in the memory-mapped file."""
    from pyarrow import ListScalar, StructScalar

    if not cell.is_valid:
        return []
    entries = cell.values if isinstance(cell, ListScalar) else [cell]
    return [one["bytes"] if isinstance(one, StructScalar) else one for one in entries]


def _size(image: StoredImage) -> tuple[int, int]:
    """(width, height)."""
    from tokenpacker.images import image_size

    height, width = image_size(image.read())
    return width, height


def _texts(name: str, value: Any) -> tuple[str, ...]:
    """A text or a list of texts as a tuple; empty for None. Raises ValueError for anything else."""
    texts = () if value is None else (value,) if isinstance(value, str) else tuple(value)
    if any(not isinstance(text, str) for text in texts):
        raise ValueError(f"{name}={value!r} is no text")
    return texts


def _check_answers(table: Table, questions: list[BenchQuestion]) -> Iterator[Problem]:
    """Marks questions that cannot be scored, unless no question of the split has an answer."""
    from tokenpacker.evaluate.metrics import METRICS
    from tokenpacker.evaluate.protocols import protocol

    metric = METRICS[protocol(table.benchmark).metric]
    if metric.scored_elsewhere or not any(question.answers for question in questions):
        return
    for place, question in enumerate(questions):
        if "problem" in question.extra:
            continue
        try:
            metric.check(question)
        except ValueError as error:
            questions[place] = replace(question, extra={**question.extra, "problem": str(error)})
            yield Problem("malformed row", question.id, str(error))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"
