"""Data that is read in order, from a place that can be written down: tar shards, and streams of the datasets library.

A stream is a list of shards. Each epoch reads them in another order, decided by seed and epoch; within a shard the
order is the file's. A position is plain JSON: how many samples, good or bad, of which shard in this order are done.

    {"epoch": 0, "shard": 3, "sample": 17, "stream": "9f3c..."}

It holds for any number of processes: ranks take samples of the one order in turn. `stream` is a fingerprint of the
shards' own names and sizes, so that a position is not used with other data, but is with data that moved as a whole.

Tar shards follow WebDataset: files of a sample share a name up to the first dot. `key.json` is a LLaVA row without its
images, which are `key.jpg`, or `key.0.jpg`, `key.1.jpg` and so on; a `key.txt` instead is a caption. Regions stand in
the row; the path of a mask starts from the shard's folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenpacker.data.rows import COLUMNS, Record, RecordError, caption_messages, parse_row, read_row
from tokenpacker.hub import hub_problem

IMAGE_SUFFIXES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"}
TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")
Position = dict[str, Any]


class Shard(Protocol):
    """One part of a stream; `name` is for people, `identity` tells it from others wherever it lies."""

    name: str
    identity: str

    def read(self, start: int) -> Iterator[Record | RecordError]:
        """The samples from number `start` on. What cannot be read ends the shard with a RecordError."""


class Stream:
    """Records of shards, in an order that seed and epoch decide.

    Args:
        shards: in any fixed order.
        seed: with the epoch decides the order of the shards; None keeps theirs.

    Raises:
        ValueError: without shards.
    """

    def __init__(self, shards: Sequence[Shard], seed: int | None = 0) -> None:
        if not shards:
            raise ValueError("a stream needs at least one shard; check the path of the data")
        self.shards = tuple(shards)
        self.seed = seed
        described = json.dumps([self.seed, [shard.identity for shard in self.shards]])
        self._fingerprint = hashlib.sha256(described.encode()).hexdigest()[:16]

    def start(self, epoch: int = 0) -> Position:
        """The position before the first sample of an epoch."""
        return {"epoch": epoch, "shard": 0, "sample": 0, "stream": self._fingerprint}

    def order(self, epoch: int) -> list[int]:
        """Numbers of the shards as the epoch reads them."""
        order = list(range(len(self.shards)))
        if self.seed is not None:
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order

    def stream(self, position: Position | None = None) -> Iterator[tuple[Position, Record | RecordError]]:
        """Each sample after `position` to the end of its epoch, with the position behind it.

        Args:
            position: one that this gave out, or `start`; None is the start of epoch 0.

        Raises:
            ValueError: for a position of other shards, another seed or another form.
        """
        position = self.check(self.start() if position is None else position)
        epoch, first = position["epoch"], position["shard"]
        for place, number in enumerate(self.order(epoch)[first:], first):
            done = position["sample"] if place == first else 0
            for sample, record in enumerate(self.shards[number].read(done), done + 1):
                yield {"epoch": epoch, "shard": place, "sample": sample, "stream": self._fingerprint}, record

    def where(self, position: Position) -> str:
        """The sample before a position that this gave out, for messages: its shard and its number there."""
        shard = self.shards[self.order(position["epoch"])[position["shard"]]]
        return f"{shard.name}, sample {position['sample']}"

    def check(self, position: Position) -> Position:
        """The position; raises ValueError as `stream`."""
        keys = ("epoch", "shard", "sample")
        if not isinstance(position, dict) or not all(type(position.get(key)) is int for key in keys):
            raise ValueError(f"position={position!r} needs whole numbers {', '.join(keys)}; use one that a stream gave")
        if min(position[key] for key in keys) < 0 or position["shard"] >= len(self.shards):
            raise ValueError(
                f"position={position!r} lies outside the {len(self.shards)} shards; use one of this stream"
            )
        if position.get("stream") != self._fingerprint:
            raise ValueError(f"position={position!r} belongs to other shards or another seed; go on with the same data")
        return position


def open_shards(paths: str | Path | Sequence[str | Path], *, seed: int | None = 0) -> Stream:
    """The stream of WebDataset tar files; a folder stands for those in it.

    Raises:
        ValueError: for a missing file and a folder without tar files.
        ImportError: without webdataset.
    """
    try:
        import webdataset  # noqa: F401 - said here, before a run has begun
    except ImportError:
        raise ImportError("tar shards need webdataset; run: pip install 'tokenpacker[train]'") from None
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    return Stream([_TarShard(path) for entry in given for path in _tar_files(Path(entry))], seed)


def open_dataset(dataset: Any, images_root: str | Path | None = None, *, seed: int | None = 0) -> Stream:
    """The stream of a `datasets.IterableDataset`, such as `load_dataset(..., streaming=True)` gives.

    Its columns are those of a LLaVA row. Images are not decoded. Going on within a shard reads it from its beginning.

    Args:
        dataset: unshuffled, for its shuffle buffer is lost on resuming; the order of shards is shuffled here.
        images_root: folder that image paths are below; None is the working folder.
    """
    root = Path(os.path.abspath(images_root or "."))
    dataset = _without_decoding(dataset)
    return Stream([_DatasetShard(dataset, number, root) for number in range(dataset.num_shards)], seed)


def open_hub_dataset(name: str, images_root: str | Path | None = None, *, seed: int | None = 0) -> Stream:
    """The stream of a data set that the `datasets` library knows, on the Hugging Face hub or in a local folder.

    Args:
        name: `OWNER/NAME`, or a folder with Parquet, JSON or CSV files; `:SPLIT` behind it takes another split than
            `train`, `:CONFIG/SPLIT` that of a configuration.
        images_root: folder that image paths are below; None is the working folder.

    Raises:
        ValueError: for a data set, configuration or split that does not exist or cannot be reached.
        ImportError: without datasets.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError("a data set of the hub needs datasets; run: pip install 'tokenpacker[train]'") from None
    path, _, part = name.partition(":")
    configuration, _, split = part.rpartition("/")
    problem = None if Path(path).exists() else hub_problem()
    try:
        if problem is not None:  # the library would try for half a minute
            raise ConnectionError(problem)
        dataset = load_dataset(path, configuration or None, split=split or "train", streaming=True)
    except (ValueError, OSError) as error:  # ConnectionError and FileNotFoundError among them
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"data set {name} cannot be opened ({reason}); check the name, OWNER/NAME, OWNER/NAME:SPLIT or"
            " OWNER/NAME:CONFIG/SPLIT, and the network, or give a folder that holds it"
        ) from None
    return open_dataset(dataset, images_root, seed=seed)


class _TarShard:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        self.identity = f"{path.name}, {path.stat().st_size} bytes"

    def read(self, start: int) -> Iterator[Record | RecordError]:
        number = -1
        try:
            for number, group in enumerate(self._groups()):
                if number >= start:
                    yield self._record(group)
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            # The files of the sample at which reading ended are not whole: it is this reject.
            if number + 1 >= start:
                yield _damaged(self.name, number + 1, error)

    def _groups(self) -> Iterator[dict[str, Any]]:
        """The files of each sample by suffix, under `problem` what is wrong with them. Raises for a damaged file."""
        from webdataset.tariterators import group_by_keys, tar_file_expander

        problems: list[str] = []

        def keep_problem(error: Exception) -> bool:
            problems.append(str(error.args[0]))
            return True

        with self.path.open("rb") as file:
            files = tar_file_expander([{"url": self.name, "stream": file}])
            for group in group_by_keys(files, handler=keep_problem):
                yield {**group, "problem": problems.pop()} if problems else group
                problems.clear()

    def _record(self, group: Mapping[str, Any]) -> Record | RecordError:
        key = group["__key__"]
        where = f"{self.name}, {key}"
        if "problem" in group:
            return RecordError(key, f"its files cannot be used: {group['problem']}", source=where)
        images = sorted((suffix for suffix in group if _is_image(suffix)), key=_image_number)
        try:
            row = parse_row(group["json"], where) if "json" in group else {}
            if isinstance(row, dict):
                row = {name: value for name, value in row.items() if name in ("id", "conversations", "regions")}
                row = {"id": key, **row, "images": [group[suffix] for suffix in images]}
                if "conversations" not in row and "txt" in group:
                    row["conversations"] = caption_messages(group["txt"].decode())
            return read_row(row, self.path.parent, where)
        except RecordError as error:
            return error
        except UnicodeDecodeError as error:
            return RecordError(key, f"{key}.txt is no UTF-8 at byte {error.start + 1}; save it as UTF-8", source=where)


class _DatasetShard:
    def __init__(self, dataset: Any, number: int, images_root: Path) -> None:
        self._dataset = dataset
        self._number = number
        self._images_root = images_root
        self.name = (
            f"{getattr(dataset.info, 'dataset_name', None) or 'dataset'}, shard {number + 1} of {dataset.num_shards}"
        )
        self.identity = f"{self.name}, {dataset.info.config_name}, {dataset.split}"

    def read(self, start: int) -> Iterator[Record | RecordError]:
        part = self._dataset.shard(self._dataset.num_shards, self._number)
        number = -1
        try:
            # Not iter(part): in a worker process of torch that leaves out what it takes for other workers' share.
            for number, rows in enumerate(part.iter(batch_size=1)):
                if number >= start:
                    row = {name: rows[name][0] for name in COLUMNS if name in rows}
                    yield self._record(row, f"{self.name}, row {number + 1}")
        except (ValueError, EOFError, zlib.error, OSError) as error:
            # A network that fails is no damage: leaving the rest out would hide it, and a run can go on later.
            if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
                raise
            if number + 1 >= start:
                yield _damaged(self.name, number + 1, error)

    def _record(self, row: Mapping[str, Any], where: str) -> Record | RecordError:
        try:
            return read_row(row, self._images_root, where)
        except RecordError as error:
            return error


def _damaged(name: str, num_read: int, error: Exception) -> RecordError:
    where = f"{name}, after sample {num_read}"
    reason = f"the shard cannot be read on ({error.args[0]}), so its rest is left out; fetch it again"
    return RecordError(where, reason, "damaged shard", where)


def _without_decoding(dataset: Any) -> Any:
    """The dataset with its image columns as bytes or paths."""
    from datasets import Image, List

    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            dataset = dataset.cast_column(name, List(Image(decode=False)))
    return dataset


def _tar_files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(entry for entry in path.iterdir() if entry.name.endswith(TAR_ENDINGS))
        if not found:
            raise ValueError(f"folder {path} holds no tar files; give the shards themselves")
        return found
    if not path.is_file():
        raise ValueError(f"shard {path} does not exist; check the path")
    return [path]


def _is_image(suffix: str) -> bool:
    return suffix.rpartition(".")[2] in IMAGE_SUFFIXES


def _image_number(suffix: str) -> tuple[int, str]:
    """`jpg` before `0.jpg`, and `2.jpg` before `10.jpg`."""
    number = suffix.rpartition(".")[0]
    return (int(number) if number.isdecimal() else -1, suffix)
