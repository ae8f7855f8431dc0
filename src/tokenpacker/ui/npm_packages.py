"""Packages of npm that the page without a server needs: fetched from the registry once, and checked."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

REGISTRY = "https://registry.npmjs.org"
TIMEOUT_S = 30.0


@dataclass(frozen=True)
class NpmPackage:
    """A version of a package, the SHA-512 of its archive in npm's form, and the files of it that the page needs."""

    name: str
    version: str
    integrity: str
    files: tuple[str, ...]

    @property
    def archive(self) -> str:
        """The file name that `npm pack` gives the archive."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"

    @property
    def address(self) -> str:
        """Where the archive is, on the registry that npm's own variable names."""
        registry = os.environ.get("NPM_CONFIG_REGISTRY", REGISTRY).rstrip("/")
        return f"{registry}/{self.name}/-/{self.name.split('/')[-1]}-{self.version}.tgz"

    def is_archive(self, content: bytes) -> bool:
        """Whether the content has the right checksum."""
        return self.integrity == "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode()


RUNTIME = NpmPackage(
    "onnxruntime-web",
    "1.30.0",
    "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
    ("dist/ort.wasm.bundle.min.mjs", "dist/ort-wasm-simd-threaded.wasm", "README.md"),
)
TOKENIZER = NpmPackage(
    "@huggingface/tokenizers",
    "0.2.0",
    "sha512-LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==",
    ("dist/tokenizers.min.mjs", "LICENSE"),
)


def unpack(package: NpmPackage, folder: Path) -> None:
    """Writes the needed files of a package into a folder; their names get no path."""
    with tarfile.open(fileobj=io.BytesIO(_archive(package)), mode="r:gz") as archive:
        for file in package.files:
            member = archive.extractfile(f"package/{file}")
            assert member is not None, f"{package.archive} holds no {file}"
            name = Path(file).name if file.startswith("dist/") else f"{package.archive[:-4]}-{file}"
            (folder / name).write_bytes(member.read())


def _archive(package: NpmPackage) -> bytes:
    """The archive of a package, from the user's cache or the registry. Raises OSError if it is on neither."""
    from huggingface_hub import cached_assets_path
    from huggingface_hub.utils import httpx

    path = cached_assets_path("tokenpacker", namespace="npm") / package.archive
    if path.is_file() and package.is_archive(content := path.read_bytes()):
        return content
    remedy = f"run `npm pack {package.name}@{package.version}` elsewhere, and put {package.archive} into {path.parent}"
    try:
        response = httpx.get(package.address, timeout=TIMEOUT_S, follow_redirects=True).raise_for_status()
    except Exception as error:  # network libraries raise many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{package.address} cannot be fetched ({reason}); {remedy}") from None
    if not package.is_archive(response.content):
        raise OSError(f"{package.address} gave another file than expected (its SHA-512 differs); {remedy}")
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_bytes(response.content)
    partial.replace(path)
    return response.content
