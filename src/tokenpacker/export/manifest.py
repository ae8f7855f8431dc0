"""`export.json`: what an exported folder holds. Without torch: a runner reads it first."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, Literal, get_args

Runtime = Literal["onnx", "openvino"]
Quantization = Literal["int8"]
NAME = "export.json"
REMEDY = "give a folder that `tokenpacker export` wrote"
ANEW = "copy the folder again, or export the model anew"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of an exported folder.

    Args:
        tokenpacker: version of this package that wrote it, beside that of transformers.
        runtime: `onnx` or `openvino`.
        quantization: `int8`, or None.
        dtype: of inputs, outputs and weights that are not quantized.
        image_token_id: the id whose embeddings packed tokens replace.
        max_positions: longest prompt with its answer; None if the model does not say.
        vision_encoders: for each scale factor its file; the first is the default. A scale factor of None is the only
            one of a projector whose tokens have none.
        embed_tokens: file of the embeddings.
        decoder: file of the decoder with cache.
        cache: number of layers, key-value heads and their width, of which a first, empty cache is made.
        files: size and SHA-256 of every other file.
    """

    tokenpacker: str
    transformers: str
    runtime: Runtime
    quantization: Quantization | None
    dtype: str = "float32"
    image_token_id: int
    max_positions: int | None
    vision_encoders: list[dict[str, Any]]
    embed_tokens: str
    decoder: str
    cache: dict[str, int]
    files: dict[str, dict[str, Any]]

    def write(self, folder: Path) -> None:
        """Writes it into the folder."""
        (folder / NAME).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of an exported folder.

        Raises:
            ValueError: if it is missing or damaged, or a file is missing or has another size or SHA-256.
        """
        path = folder / NAME
        if not path.is_file():
            raise ValueError(f"{folder} has no {NAME}; {REMEDY}")
        try:
            manifest = cls(**json.loads(path.read_text(encoding="utf-8")))
            _check_content(manifest)
        except (ValueError, TypeError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path} is damaged ({reason}); export the model anew") from None
        for name, entry in manifest.files.items():
            size = os.path.getsize(folder / name) if os.path.isfile(folder / name) else None
            if size != entry["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes, not {entry['bytes']}"
                raise ValueError(f"{folder / name} {found}; {ANEW}")
        for name, entry in manifest.files.items():
            if _sha256(folder / name) != entry["sha256"]:
                raise ValueError(f"{folder / name} has another SHA-256 than {NAME} says; {ANEW}")
        return manifest

    @property
    def scale_factors(self) -> list[int | None]:
        """The exported ones, the default first."""
        return [entry["scale_factor"] for entry in self.vision_encoders]

    def total_bytes(self) -> int:
        """The size of all files of graphs."""
        return sum(entry["bytes"] for name, entry in self.files.items() if name.startswith(f"{self.runtime}/"))


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of a folder, by its path within it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }


def _check_content(manifest: Manifest) -> None:
    """Raises ValueError for a value that `Manifest.write` does not write, and for a path out of the folder."""
    for key in ("tokenpacker", "transformers", "dtype"):
        _require(isinstance(getattr(manifest, key), str), key, getattr(manifest, key), "a text")
    for key, known in (("runtime", get_args(Runtime)), ("quantization", (None, *get_args(Quantization)))):
        value = getattr(manifest, key)
        _require(value in known, key, value, f"one of {', '.join(map(str, known))}")
    _require(_is_whole(manifest.image_token_id, 0), "image_token_id", manifest.image_token_id, "a whole number")
    most = manifest.max_positions
    _require(most is None or _is_whole(most), "max_positions", most, "a whole number of at least 1, or null")
    cache, sizes = manifest.cache, {"layers", "heads", "head_dim"}
    fits = isinstance(cache, dict) and cache.keys() == sizes and all(map(_is_whole, cache.values()))
    _require(fits, "cache", cache, "layers, heads and head_dim, whole numbers of at least 1")
    _require(isinstance(manifest.files, dict), "files", manifest.files, "an object")
    for name, entry in manifest.files.items():
        _require(_is_inside(name), "files", name, "paths within the folder, without ..")
        fits = isinstance(entry, dict) and _is_whole(entry.get("bytes"), 0) and isinstance(entry.get("sha256"), str)
        fits = fits and re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]) is not None
        _require(fits, f"files: {name}", entry, "bytes, a whole number, and sha256, 64 hexadecimal digits")
    encoders = manifest.vision_encoders
    _require(isinstance(encoders, list) and encoders, "vision_encoders", encoders, "a list of at least one encoder")
    for entry in encoders:
        fits = isinstance(entry, dict) and entry.keys() == {"scale_factor", "file"}
        fits = fits and (entry["scale_factor"] is None or _is_whole(entry["scale_factor"]))
        _require(fits, "vision_encoders", entry, "a file with a scale_factor, a whole number of at least 1 or null")
        _require_graph(manifest, "vision_encoders", entry["file"])
    _require_graph(manifest, "embed_tokens", manifest.embed_tokens)
    _require_graph(manifest, "decoder", manifest.decoder)


def _require(fits: object, key: str, value: object, rule: str) -> None:
    if not fits:
        raise ValueError(f"{key} has {repr(value)[:80]} but must have {rule}")


def _require_graph(manifest: Manifest, key: str, file: object) -> None:
    _require(isinstance(file, str) and file in manifest.files, key, file, "one of the files under files")


def _is_whole(value: object, least: int = 1) -> bool:
    return type(value) is int and value >= least  # bool is an int, too


def _is_inside(name: str) -> bool:
    """Whether a path stays within its folder on every system; Windows knows the separators of both."""
    path = PureWindowsPath(name)
    return bool(path.parts) and not path.anchor and ".." not in path.parts and name.isprintable()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _digest(file)
    return str(digest.hexdigest())


def _digest(file: Any) -> Any:
    """`hashlib.file_digest`, which Python 3.10 lacks."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest
