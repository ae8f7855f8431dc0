"""Data sets of the hub as files in a folder: what a repository has, under which licence, and fetching it.

Every file is compared with the hub's checksum. `source.json` in the folder holds the repository, the revision and the
checksums; calling again goes on with this revision. huggingface_hub keeps complete files only: a file of which a part
was fetched is fetched anew.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tokenpacker.hub import hub_problem
from tokenpacker.progress import Progress

RECORD = "source.json"
READ_ALONG = ("README.md", "LICENSE*")  # fetched with any data, where they are there
SPARE_BYTES = 100_000_000
PIECE = 2**20  # bytes read at once for a checksum
ATTEMPTS = 2


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """A file of a repository.

    Args:
        path: within the repository.
        size: bytes.
        checksum: SHA-256 of a large file; git's SHA-1 of a small one.
    """

    path: str
    size: int
    checksum: str


@dataclass(frozen=True, kw_only=True)
class HubFiles:
    """Files of a repository at a revision.

    Args:
        revision: the commit.
        license: as the data set's page states it; empty if it states none.
    """

    repository: str
    revision: str
    license: str
    files: tuple[HubFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def find_files(repository: str, patterns: Sequence[str], folder: Path, revision: str | None = None) -> HubFiles:
    """The files of a data set that match the patterns, each of which must match one. Asks the hub; fetches nothing.

    Args:
        folder: where they will go.
        revision: branch, tag or commit; None takes the one that the folder has, else `main`.

    Raises:
        ValueError: if the hub cannot be reached, lacks the data set, the revision or files that match, or if the
            folder has another data set or revision.
    """
    from huggingface_hub import HfApi, constants

    page = f"{constants.ENDPOINT}/datasets/{repository}"
    remedy = f"download {', '.join(patterns)} from {page} on any machine, and put them into {folder}, paths as there"
    if problem := hub_problem():
        raise ValueError(f"data set {repository} cannot be fetched ({problem}); {remedy}")
    held = read_record(folder)
    pinned = held["revision"] if held.get("repository") == repository else None
    with hub_errors(repository, remedy):
        info = HfApi().dataset_info(repository, revision=revision or pinned, files_metadata=True)
    siblings = {file.rfilename: file for file in info.siblings or ()}
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in siblings):
            raise ValueError(
                f"data set {repository} has no {pattern} at revision {info.sha}; see {page}/tree/{info.sha}"
            )
    if held and (held["repository"], held["revision"]) != (repository, info.sha):
        raise ValueError(
            f"{folder} holds {held['repository']} at revision {held['revision']}, and {info.sha} is asked for; choose"
            f" another folder, or remove this one"
        )
    files = [
        HubFile(path=path, size=file.size or 0, checksum=file.lfs.sha256 if file.lfs else str(file.blob_id))
        for path, file in siblings.items()
        if any(fnmatchcase(path, pattern) for pattern in (*patterns, *READ_ALONG))
    ]
    return HubFiles(repository=repository, revision=str(info.sha), license=_license(info), files=tuple(files))


def get_files(found: HubFiles, folder: Path) -> None:
    """Fetches the files that a folder lacks and verifies all of them. Complete files are kept if it is stopped.

    Raises:
        ValueError: if the disk is too small, files cannot be fetched, or a file differs from its checksum after it
            was fetched anew; it is removed then.
        OSError: of the disk.
    """
    _check_room(found, folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_record(found, folder)
    wrong = list(found.files)
    for _ in range(ATTEMPTS):
        with _shown("download", found, folder), hub_errors(found.repository, "complete files are kept: call it again"):
            _fetch(found, folder)
        wrong = _differing(wrong, folder)
        for file in wrong:
            (folder / file.path).unlink(missing_ok=True)
        if not wrong:
            return
    raise ValueError(
        f"{wrong[0].path} of {found.repository} differs from the hub's checksum each time it is fetched, and was"
        " removed; check the disk and the network, and call it again"
    )


def read_record(folder: Path) -> dict[str, Any]:
    """What `source.json` in a folder says of its data set: repository, revision, license, files; empty without it."""
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and {"repository", "revision"} <= content.keys() else {}


def _write_record(found: HubFiles, folder: Path) -> None:
    """Adds the files to `source.json`; those of other splits stay."""
    before = read_record(folder).get("files", [])
    paths = {file.path for file in found.files}
    content = asdict(found)
    content["files"] = [*(file for file in before if file["path"] not in paths), *content["files"]]
    (folder / RECORD).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _license(info: Any) -> str:
    """The licence in the data set's card; empty if it has none."""
    card = info.card_data.to_dict() if info.card_data else {}
    stated = card.get("license") or [tag[8:] for tag in info.tags or () if tag.startswith("license:")]
    names = [stated] if isinstance(stated, str) else list(stated or ())
    return ", ".join(map(str, [*names, *(card[key] for key in ("license_name", "license_link") if card.get(key))]))


def _check_room(found: HubFiles, folder: Path) -> None:
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    needed = found.size - _size_here(found, folder) + SPARE_BYTES
    if (free := shutil.disk_usage(place).free) < needed:
        raise ValueError(f"{place} has room for {free / 1e9:.1f} GB but {needed / 1e9:.1f} GB are needed; free some")


def _size_here(found: HubFiles, folder: Path) -> int:
    """Bytes of the files that are here, and of parts of them."""
    paths = [*(folder / file.path for file in found.files), *(folder / ".cache").rglob("*.incomplete")]
    sizes = []
    for path in paths:
        try:
            sizes.append(path.stat().st_size)
        except OSError:  # noqa: PERF203 - it may be moved at any moment
            continue
    return min(sum(sizes), found.size)


def _fetch(found: HubFiles, folder: Path) -> None:
    """One file after the other, in this thread: Ctrl-C ends it at once, which `snapshot_download`'s threads do not."""
    from huggingface_hub import hf_hub_download
    from tqdm import tqdm

    class Silent(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})

    for left_over in (folder / ".cache").rglob("*.incomplete"):  # of a process that was killed
        left_over.unlink(missing_ok=True)
    for file in found.files:
        hf_hub_download(
            found.repository,
            file.path,
            repo_type="dataset",
            revision=found.revision,
            local_dir=folder,
            tqdm_class=Silent,
        )


@contextmanager
def _shown(title: str, found: HubFiles, folder: Path) -> Iterator[None]:
    """Within the context, the bytes in the folder are shown each second."""
    done = threading.Event()
    with Progress(title, found.size, done=_size_here(found, folder), written=megabytes) as progress:

        def watch() -> None:
            while not done.wait(1):
                progress.update(_size_here(found, folder))

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        progress.update(_size_here(found, folder))


def megabytes(size: int) -> str:
    """A size for people."""
    return f"{size / 1e6:,.1f} MB"


def _differing(files: Sequence[HubFile], folder: Path) -> list[HubFile]:
    """The files that are missing or differ from their checksum."""
    wrong = []
    with Progress("checksums", sum(file.size for file in files), written=megabytes) as progress:
        done = 0
        for file in files:
            if not _is_intact(file, folder / file.path):
                wrong.append(file)
            progress.update(done := done + file.size)
    return wrong


def _is_intact(file: HubFile, path: Path) -> bool:
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    is_large = len(file.checksum) == hashlib.sha256().digest_size * 2
    digest = hashlib.sha256() if is_large else hashlib.sha1(f"blob {file.size}\0".encode())
    with path.open("rb") as content:
        while piece := content.read(PIECE):
            digest.update(piece)
    return digest.hexdigest() == file.checksum


@contextmanager
def hub_errors(repository: str, remedy: str, known: str | None = None) -> Iterator[None]:
    """Within the context, the hub's and the network's errors become ValueErrors of one line.

    Args:
        known: why the hub cannot be reached, if that is known.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except GatedRepoError:
        problem, remedy = "its owners ask for consent first", "agree on its page, then run: hf auth login"
    except RepositoryNotFoundError:
        problem, remedy = "the hub has no such data set, or it is private", "check the name, or run: hf auth login"
    except RevisionNotFoundError:
        problem, remedy = "it has no such revision", "check it"
    except Exception as error:  # of several network libraries
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of this machine, such as a full disk
        problem = known or " ".join(str(error).split())[:200] or type(error).__name__
    else:
        return
    raise ValueError(f"data set {repository} cannot be fetched ({problem}); {remedy}")
