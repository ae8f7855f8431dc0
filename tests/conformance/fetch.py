"""Fetches transformers' own common tests: the source archive of the installed version carries them.

Nothing of theirs is committed. They are unpacked once into an ignored folder beside the code.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

VERSION = version("transformers")
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "transformers-tests" / VERSION
PACKAGE = "transformers_tests"
"""What the unpacked `tests/` is called; under its own name it would hide ours."""


def fetch() -> Path:
    """The folder with the unpacked tests, after fetching them where they are absent."""
    folder = CACHE / PACKAGE
    if folder.is_dir():
        return folder
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE.parent) as temporary:
        requirement = f"transformers=={VERSION}"
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*download, "--no-binary", "transformers", "--dest", temporary, requirement], check=True)
        archive = next(Path(temporary).glob("transformers-*.tar.gz"))
        with tarfile.open(archive) as tar:
            members = [member for member in tar.getmembers() if "/tests/" in member.name]
            tar.extractall(temporary, members, filter="data")
        tests = next(Path(temporary).glob("transformers-*/tests"))
        (tests / "__init__.py").touch()
        CACHE.mkdir(exist_ok=True)
        tests.rename(folder)
    return folder


if __name__ == "__main__":
    print(f"the common tests of transformers {VERSION} are in {fetch()}")
