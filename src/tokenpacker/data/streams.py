"""Records in order, from a position that can be written down: tar shards, and streams of the datasets library.

A stream is a list of shards. Each epoch reads them in another order, which seed and epoch decide; within a shard the
order is the file's. A position is plain JSON: how many samples, good or bad, of which shard in this order are done.

    {"epoch": 0, "shard": 3, "sample": 17, "stream": "9f3c..."}

It holds for any number of processes, which take samples of the one order in turn. `stream` is a fingerprint of the
names and sizes of the shards, so that a position cannot be used with other data, but can after the data are moved.

Tried instead: the `state_dict` of datasets 5.2 and of torchdata 0.11's StatefulDataLoader. Each holds the place of one
process: on another number of processes samples come twice, and another number of workers is an AssertionError.

Tar shards follow WebDataset: files of a sample share a name up to the first dot. `key.json` is a LLaVA row without its
images, which are `key.jpg`, or `key.0.jpg`, `key.1.jpg` and so on. A `key.txt` instead is a caption. Regions are in the
row; the path of a mask starts from the shard's folder. webdataset splits the files; `load_dataset("webdataset")` of
datasets 5.2 does not take them, as it refuses samples with different files and ends at the first bad JSON.
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
    """One part of a stream. `name` is for messages; `identity` stays the same if the shard is moved."""

    name: str
    identity: str

    def read(self, start: int) -> Iterator[Record | RecordError]:
        """The samples from number `start` on. Damage ends the shard with a RecordError."""


class Stream:
    """Records of shards.

    Args:
        shards: in any fixed order.
        seed: decides, with the epoch, the order of the shards; None keeps theirs.

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
        """Each sample from `position` to the end of its epoch, with the position after it.

        Args:
            position: one that this method gave, or `start`; None is the start of epoch 0.

        Raises:
            ValueError: if the position belongs to other shards or another seed, or is none.
        """
        position = self.check(self.start() if position is None else position)
        epoch, first = position["epoch"], position["shard"]
        for place, number in enumerate(self.order(epoch)[first:], first):
            done = position["sample"] if place == first else 0
            for sample, record in enumerate(self.shards[number].read(done), done + 1):
                yield {"epoch": epoch, "shard": place, "sample": sample, "stream": self._fingerprint}, record

    def check(self, position: Position, *more: str) -> Position:
        """The position itself, which may have to have `more` keys. Raises the ValueErrors of `stream`."""
        keys = ("epoch", "shard", "sample", *more)
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
    """The stream of WebDataset tar files; a folder stands for the tar files in it.

    Raises:
        ValueError: if a file is missing or a folder has no tar files.
        ImportError: without webdataset.
    """
    try:
        import webdataset  # noqa: F401 - fails here, before a run begins
    except ImportError:
        raise ImportError("tar shards need webdataset; run: pip install 'tokenpacker[train]'") from None
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    return Stream([_TarShard(path) for entry in given for path in _tar_files(Path(entry))], seed)


def open_dataset(dataset: Any, images_root: str | Path | None = None, *, seed: int | None = 0) -> Stream:
    """The stream of a `datasets.IterableDataset`, such as `load_dataset(..., streaming=True)` returns.

    Its columns are those of a LLaVA row. Images are not decoded. To continue within a shard, it is read from its start.

    Args:
        dataset: unshuffled; the order of its shards is shuffled here.
        images_root: folder that image paths are relative to; None is the working folder.
    """
    root = Path(os.path.abspath(images_root or "."))
    dataset = _without_decoding(dataset)
    return Stream([_DatasetShard(dataset, number, root) for number in range(dataset.num_shards)], seed)


def open_hub_dataset(name: str, images_root: str | Path | None = None, *, seed: int | None = 0) -> Stream:
    """The stream of a data set that the `datasets` library can load, from the Hugging Face hub or a local folder.

    Args:
        name: `OWNER/NAME`, or a folder with Parquet, JSON or CSV files. `:SPLIT` after it takes another split than
            `train`, `:CONFIG/SPLIT` one of a configuration.
        images_root: folder that image paths are relative to; None is the working folder.

    Raises:
        ValueError: if the data set, configuration or split does not exist or cannot be reached.
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
            # The sample at which reading ended is incomplete: this reject stands for it.
            if number + 1 >= start:
                yield _damaged(self.name, number + 1, error)

    def _groups(self) -> Iterator[dict[str, Any]]:
        """The files of each sample by suffix; under `problem`, what is wrong. Raises if the shard is damaged."""
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
        name = getattr(dataset.info, "dataset_name", None) or "dataset"
        self.name = f"{name}, shard {number + 1} of {dataset.num_shards}"
        self.identity = f"{self.name}, {dataset.info.config_name}, {dataset.split}"

    def read(self, start: int) -> Iterator[Record | RecordError]:
        part = self._dataset.shard(self._dataset.num_shards, self._number)
        number = -1
        try:
            # Not iter(part): in a worker process of torch it leaves out the share of the other workers.
            for number, rows in enumerate(part.iter(batch_size=1)):
                if number >= start:
                    row = {name: rows[name][0] for name in COLUMNS if name in rows}
                    try:
                        yield read_row(row, self._images_root, f"{self.name}, row {number + 1}")
                    except RecordError as error:
                        yield error
        except (ValueError, EOFError, zlib.error, OSError) as error:
            # A failing network is no damage: a run can continue later with the samples that are left.
            if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
                raise
            if number + 1 >= start:
                yield _damaged(self.name, number + 1, error)


def _damaged(name: str, num_read: int, error: Exception) -> RecordError:
    where = f"{name}, after sample {num_read}"
    reason = f"the shard cannot be read further ({error.args[0]}), so its rest is left out; fetch it again"
    return RecordError(where, reason, "damaged shard", where)


def _without_decoding(dataset: Any) -> Any:
    """The dataset with images as bytes or paths."""
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
