"""Reads weight files one at a time: safetensors, and `.bin` files without running anything that they hold.

The loaders of transformers and huggingface_hub (`load_state_dict_from_file`) are not used: they give no names, shapes
and types before the tensors, do not compare an index with its shards, and take other objects for tensors.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# In order of preference: the single file, and the index of its sharded form.
WEIGHT_FILES = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
FETCH_AGAIN = "fetch the file anew"
WEIGHT_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STORED_TYPES = WEIGHT_TYPES | {"I64": torch.int64}  # of position ids, which older libraries stored
MAX_LISTED = 40  # names in an error message

Progress = Callable[[int, int], None]  # takes the bytes read so far and the bytes in all


@dataclass(frozen=True)
class Entry:
    """A stored tensor that is not read yet.

    Args:
        name: in its file.
        shape: as it is given out, `new_rows` included.
        new_rows: rows to append, each the mean of the stored ones.
        ours: names that the tensor gets in our model; several if it is split along its rows.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    new_rows: int = 0
    ours: tuple[str, ...] = ()

    def num_bytes(self, dtype: torch.dtype | None = None) -> int:
        """Size of the tensor in a type; None takes its own."""
        return torch.Size(self.shape).numel() * (dtype or self.dtype).itemsize


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError if the file is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}; give a folder that holds a model") from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deep
        raise ValueError(f"{path} is damaged ({error}); {FETCH_AGAIN}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (no JSON object); {FETCH_AGAIN}")
    return content


@contextlib.contextmanager
def refused_as(problem: str, remedy: str = "") -> Iterator[None]:
    """Turns every error of the block into a ValueError in one line; configs of transformers raise many kinds."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{problem} ({' '.join(str(error).split())[:200]}){remedy}") from error


def listed(names: Iterable[str]) -> str:
    """The names in order, cut short if they are too many for a message."""
    shown = sorted(map(_printable, names))
    more = f", and {len(shown) - MAX_LISTED} more" if len(shown) > MAX_LISTED else ""
    return ", ".join(shown[:MAX_LISTED]) + more


def has_weights(folder: Path) -> bool:
    """Whether the folder holds a model's weights, in any of the known forms."""
    return any((folder / name).is_file() for pair in WEIGHT_FILES for name in pair)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights, in order; each shard once.

    Raises:
        ValueError: if there are none, or if index and shards do not fit together.
    """
    for single, index in WEIGHT_FILES:
        if (folder / index).is_file():
            return _shards(folder / index)
        if (folder / single).is_file():
            return [folder / single]
    names = ", ".join(name for pair in WEIGHT_FILES for name in pair)
    loose = sorted(path.name for path in folder.glob("*-of-*"))
    reason = f"has shards such as {loose[0]} but no index" if loose else "has no weights"
    raise ValueError(f"{folder} {reason}; one of {names} is needed")


def _shards(index: Path) -> list[Path]:
    """The shards of an index, all of which must exist and hold exactly what it says."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} is damaged (no weight_map); {FETCH_AGAIN}")
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        if Path(name).name != name or Path(name).suffix not in (".bin", ".safetensors"):
            raise ValueError(
                f"{index} names the shard {_printable(name)}, which is no weight file beside it; {FETCH_AGAIN}"
            )
        if not (index.parent / name).is_file():
            raise ValueError(f"{index} names the shard {name}, which is missing; {FETCH_AGAIN}")
    files = [index.parent / name for name in names]
    stored = {key: entry.file.name for key, entry in stored_entries(files).items()}
    for key, name in weight_map.items():
        if stored.get(key) != name:
            raise ValueError(f"{index} places {key} in {name}, which does not hold it; {FETCH_AGAIN}")
    unlisted = set(stored) - set(weight_map)
    if unlisted:
        raise ValueError(f"{index} has no entry for {listed(unlisted)}, which the shards hold; {FETCH_AGAIN}")
    return files


def stored_entries(files: Iterable[Path]) -> dict[str, Entry]:
    """Name -> entry over all files; `.bin` files are opened without reading their tensors if their format allows it.

    Raises:
        ValueError: for files that cannot be read, hold other things than tensors, or hold one name twice.
    """
    found: dict[str, Entry] = {}
    for file in files:
        for entry in _header(file):
            if entry.name in found:
                other = found[entry.name].file.name
                raise ValueError(f"{entry.name} is stored twice, in {other} and {file.name}; {FETCH_AGAIN}")
            found[entry.name] = entry
    return found


def read(entries: Iterable[Entry], progress: Progress | None = None) -> Iterator[tuple[Entry, Tensor]]:
    """Entries with their tensors, file by file.

    Tensors may be views of the file: copy what you keep, and delete the rest before you go on.

    Raises:
        ValueError: for a file that cannot be read.
    """
    by_file: dict[Path, list[Entry]] = {}
    for entry in entries:
        by_file.setdefault(entry.file, []).append(entry)
    total, done = sum(entry.num_bytes() for group in by_file.values() for entry in group), 0
    for file, group in by_file.items():
        for entry, tensor in zip(group, _tensors(file, [entry.name for entry in group]), strict=True):
            if entry.new_rows:
                mean = tensor.float().mean(dim=0, keepdim=True).to(tensor.dtype)
                tensor = torch.cat([tensor, mean.expand(entry.new_rows, -1)])
            yield entry, tensor
            del tensor  # it would hold its file while the next one is read
            done += entry.num_bytes()
            if progress is not None:
                progress(done, total)


def check_finite(tensor: Tensor, dtype: torch.dtype | None, where: str) -> None:
    """Raises ValueError for a tensor that holds NaN or infinity, or would after a cast to `dtype`.

    The smallest and the largest number decide, so that no mask as large as the tensor is made.
    """
    if not tensor.numel():
        return
    low, high = torch.aminmax(tensor)
    if not bool(low.isfinite() & high.isfinite()):
        raise ValueError(f"{where} holds NaN or infinity, so the file is damaged; {FETCH_AGAIN}")
    if dtype is not None and max(-low.item(), high.item()) > torch.finfo(dtype).max:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"{where} holds numbers too large for {name}; use bfloat16 or float32")


def _header(file: Path) -> list[Entry]:
    if file.suffix != ".safetensors":
        return [Entry(file, name, tuple(tensor.shape), tensor.dtype) for name, tensor in _unpickle(file).items()]
    try:
        with safe_open(file, framework="pt") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
            stored = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except (SafetensorError, OSError, KeyError) as error:
        raise _unreadable(file, error) from error
    for name, (_, code) in stored.items():
        if code not in STORED_TYPES:
            raise ValueError(f"{file} holds {_printable(name)} as {code}; weights are {', '.join(WEIGHT_TYPES)}")
    return [Entry(file, name, shape, STORED_TYPES[code]) for name, (shape, code) in stored.items()]


def _tensors(file: Path, names: Iterable[str]) -> Iterator[Tensor]:
    if file.suffix != ".safetensors":
        content = _unpickle(file)
        yield from (content[name] for name in names)
        return
    try:
        with safe_open(file, framework="pt") as opened:
            for name in names:
                yield opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error) from error


def _unpickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a `.bin` file, mapped from disk if its format allows it. Nothing in the file is executed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickle protocols, before the error that follows
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=_can_be_mapped(file))
    except FileNotFoundError:
        raise ValueError(f"{file} is missing; {FETCH_AGAIN}") from None
    except pickle.UnpicklingError as error:
        forbidden = re.search(r"GLOBAL ([\w.]+)", str(error))
        if forbidden is None:
            raise _unreadable(file, error) from None
        raise ValueError(
            f"{file} is refused: beside tensors it wants to call {forbidden[1]}, which could run any code;"
            " get the weights from a source that you trust, as safetensors if there are any"
        ) from None
    except Exception as error:  # torch raises many kinds for damaged archives
        raise _unreadable(file, error) from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not names and tensors; give a file of weights")
    for name, value in content.items():
        if not isinstance(name, str) or not _is_plain(value):
            kind = f"{value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{file} holds {_printable(name)}: {kind}, which is no plain tensor of weights")
    return content


def _can_be_mapped(file: Path) -> bool:
    """Whether the file is an archive that stores its entries uncompressed."""
    try:
        with zipfile.ZipFile(file) as archive:
            return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError):
        return False


def _is_plain(value: Any) -> bool:
    """Whether a value is an ordinary tensor with numbers that a weight can have."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not value.is_nested
        and value.device.type == "cpu"
        and value.dtype in STORED_TYPES.values()
    )


def _printable(name: object) -> str:
    """A name from a file that may be hostile, fit for a terminal."""
    text = name if isinstance(name, str) and name.isprintable() else repr(name)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _unreadable(file: Path, error: Exception) -> ValueError:
    text = str(error).rsplit("WeightsUnpickler error:", 1)[-1]  # torch explains at length before it comes to the point
    reason = " ".join(text.split())[:120] or type(error).__name__
    return ValueError(f"{file} cannot be read; it is damaged or cut off ({reason}); {FETCH_AGAIN}")
