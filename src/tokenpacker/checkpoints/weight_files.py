"""Weight files to tensors, one file at a time: safetensors, and `.bin` files without ever running what they hold."""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Iterator
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
OTHER_TYPES = {"I64": torch.int64}  # of position ids, which older libraries stored


@dataclass(frozen=True)
class Stored:
    """What a weight file says of one tensor before it is read."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError where it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}; give a folder that holds a model") from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested without end
        raise ValueError(f"{path} is damaged ({error}); {FETCH_AGAIN}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (no JSON object); {FETCH_AGAIN}")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights, in order; each shard once.

    Raises:
        ValueError: when there are none, or index and shards do not fit together.
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


def has_weights(folder: Path) -> bool:
    """Whether the folder holds a model's weights, in any of the known forms."""
    return any((folder / name).is_file() for pair in WEIGHT_FILES for name in pair)


def stored_tensors(files: list[Path]) -> dict[str, Stored]:
    """Name -> what is stored, over all files; `.bin` files are opened without reading their tensors where possible.

    Raises:
        ValueError: for files that cannot be read, hold other things than tensors, or hold one name twice.
    """
    found: dict[str, Stored] = {}
    for file in files:
        for name, (shape, dtype) in _header(file).items():
            if name in found:
                raise ValueError(f"{name} is stored twice, in {found[name].file.name} and {file.name}; {FETCH_AGAIN}")
            found[name] = Stored(file, shape, dtype)
    return found


def read_tensors(file: Path, wanted: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of those in one file that are wanted.

    They may be views of the file: copy what you keep, and let go of the rest.

    Raises:
        ValueError: as `stored_tensors`.
    """
    if file.suffix != ".safetensors":
        yield from ((name, tensor) for name, tensor in _unpickle(file).items() if name in wanted)
        return
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                if name in wanted:
                    yield name, opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error) from error


def _header(file: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    if file.suffix != ".safetensors":
        return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in _unpickle(file).items()}
    try:
        with safe_open(file, framework="pt") as opened:
            entries = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
            return {
                name: (tuple(part.get_shape()), _dtype(part.get_dtype(), name, file)) for name, part in entries.items()
            }
    except (SafetensorError, OSError, KeyError) as error:
        raise _unreadable(file, error) from error


def _dtype(code: str, name: str, file: Path) -> torch.dtype:
    """The type behind a safetensors code such as F32 or BF16."""
    types = WEIGHT_TYPES | OTHER_TYPES
    if code not in types:
        raise ValueError(f"{file} holds {_clipped(name)} as {code}; weights are {', '.join(WEIGHT_TYPES)}")
    return types[code]


def _is_plain(value: Any) -> bool:
    """Whether a value is an ordinary tensor with numbers that a weight can have."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not (value.is_nested or value.is_quantized)
        and value.device.type == "cpu"
        and value.dtype in {*WEIGHT_TYPES.values(), *OTHER_TYPES.values()}
    )


def _shards(index: Path) -> list[Path]:
    """The shards of an index, all of which must be there and hold exactly what it says."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} is damaged (no weight_map); {FETCH_AGAIN}")
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        if Path(name).name != name or Path(name).suffix not in (".bin", ".safetensors"):
            raise ValueError(
                f"{index} names the shard {_clipped(name)}, which is no weight file beside it; {FETCH_AGAIN}"
            )
        if not (index.parent / name).is_file():
            raise ValueError(f"{index} names the shard {name}, which is missing; {FETCH_AGAIN}")
    files = [index.parent / name for name in names]
    stored = {key: entry.file.name for key, entry in stored_tensors(files).items()}
    for key, name in weight_map.items():
        if stored.get(key) != name:
            raise ValueError(f"{index} places {key} in {name}, which does not hold it; {FETCH_AGAIN}")
    unlisted = sorted(set(stored) - set(weight_map))
    if unlisted:
        raise ValueError(f"{index} has no entry for {_some(unlisted)}, which the shards hold; {FETCH_AGAIN}")
    return files


def _unpickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a `.bin` file, mapped from disk where its format allows it. Nothing in the file is executed."""
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
            raise ValueError(f"{file} holds {_clipped(name)}: {kind}, which is no plain tensor of weights")
    return content


def _can_be_mapped(file: Path) -> bool:
    """Whether the file is an archive whose entries lie in it as they are."""
    try:
        with zipfile.ZipFile(file) as archive:
            return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError):
        return False


def _clipped(name: object) -> str:
    """A name from a file that may be hostile, fit for a terminal."""
    text = name if isinstance(name, str) and name.isprintable() else repr(name)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _unreadable(file: Path, error: Exception) -> ValueError:
    text = str(error).rsplit("WeightsUnpickler error:", 1)[-1]  # torch explains at length before it comes to the point
    reason = " ".join(text.split())[:120] or type(error).__name__
    return ValueError(f"{file} cannot be read; it is damaged or cut off ({reason}); {FETCH_AGAIN}")


def _some(names: list[str], limit: int = 8) -> str:
    return ", ".join(map(_clipped, names[:limit])) + (f" and {len(names) - limit} more" if len(names) > limit else "")
