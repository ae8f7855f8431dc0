"""`export.json`: what an exported folder holds. Without torch: a runner reads it first."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Runtime = Literal["onnx", "openvino"]
Quantization = Literal["int8"]
NAME = "export.json"
REMEDY = "give a folder that `tokenpacker export` wrote"


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
            ValueError: if it is missing or damaged, or a file is missing or has another size.
        """
        path = folder / NAME
        if not path.is_file():
            raise ValueError(f"{folder} has no {NAME}; {REMEDY}")
        try:
            manifest = cls(**json.loads(path.read_text(encoding="utf-8")))
            sizes = {name: entry["bytes"] for name, entry in manifest.files.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}); export the model anew") from None
        for name, size in sizes.items():
            there = (folder / name).stat().st_size if (folder / name).is_file() else None
            if there != size:
                found = "is missing" if there is None else f"has {there} bytes, not {size}"
                raise ValueError(f"{folder / name} {found}; copy the folder again, or export the model anew")
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
    return {path.relative_to(folder).as_posix(): _describe(path) for path in files}


def _describe(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _digest(file)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _digest(file: Any) -> Any:
    """`hashlib.file_digest`, which Python 3.10 lacks."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest
