"""`tokenpacker data get`: fetches data sets of the hub, with checksums."""

from pathlib import Path
from typing import Annotated

from typer import Argument

from tokenpacker.cli import options
from tokenpacker.cli.errors import keeping
from tokenpacker.cli.options import flag, value
from tokenpacker.cli.output import print_note, print_result
from tokenpacker.text import did_you_mean

# name -> repository and files of LLaVA-1.5's training data
TRAINING = {
    "llava-pretrain": ("liuhaotian/LLaVA-Pretrain", ["blip_laion_cc_sbu_558k.json", "images.zip"]),
    "llava-instruct": ("liuhaotian/LLaVA-Instruct-150K", ["llava_v1_5_mix665k.json"]),
}
THEN = {
    "llava-pretrain": "unzip images.zip; tokenpacker data check {folder}/{file} --captions --images {folder}/images",
    "llava-instruct": "its images are of COCO, GQA, OCR-VQA, TextVQA and Visual Genome; LLaVA's README links them",
}


def get(
    name: Annotated[str | None, Argument(metavar="NAME", help="A data set of --list.", show_default=False)] = None,
    to: Annotated[Path, value("FOLDER", "Where the data set's folder goes.")] = Path("data"),
    split: Annotated[str | None, value("NAME", "Split of a benchmark.", "with public answers")] = None,
    revision: Annotated[str | None, value("NAME", "Branch, tag or commit.", "the folder's, else main")] = None,
    list_all: Annotated[bool, flag("--list", "List the data sets.")] = False,
    as_json: options.Json = False,
) -> None:
    """Fetch a benchmark or training data from the hub, and compare it with the hub's checksums.

    The licence and the size are shown first. A stopped call keeps complete files; call it again to go on.

    Examples:
        tokenpacker data get --list
        tokenpacker data get pope --to data
        tokenpacker data get docvqa --split test --revision main
    """
    from tokenpacker.evaluate.layouts.table_columns import TABLES

    if list_all:
        _list(as_json)
        return
    names = [*TABLES, *TRAINING]
    if name is None:
        raise ValueError("NAME is missing; `tokenpacker data get --list` lists the data sets")
    if name not in names:
        raise ValueError(f"data set {name!r} is unknown; use one of {', '.join(names)}{did_you_mean(name, names)}")
    if name in TRAINING:
        if split is not None:
            raise ValueError(f"--split has no use with {name}, which has no splits; leave it out")
        repository, patterns = TRAINING[name]
    else:
        repository, patterns = TABLES[name].repository, TABLES[name].files(split)
    from tokenpacker.data.hub_files import find_files, get_files, megabytes

    folder = to / repository.partition("/")[2]
    found = find_files(repository, patterns, folder, revision)
    print_note(f"{repository} at revision {found.revision}: {len(found.files)} files, {megabytes(found.size)}")
    print_note(f"licence: {found.license or 'not stated on its page; ask its authors before you use it'}")
    with keeping(f"complete files are kept in {folder}; call it again to go on"):
        get_files(found, folder)
    then = THEN.get(name, f"tokenpacker evaluate --tasks {name} --data {to}" + (f" --split {split}" if split else ""))
    result = {
        "name": name,
        "folder": str(folder),
        "repository": repository,
        "revision": found.revision,
        "license": found.license or None,
        "bytes": found.size,
        "files": {file.path: file.checksum for file in found.files},
    }
    text = f"{folder}: all checksums are the hub's\nnext: {then.format(folder=folder, file=patterns[0])}"
    print_result(as_json, result, text)


def _list(as_json: bool) -> None:
    from tokenpacker.evaluate.layouts.table_columns import TABLES

    sets = {name: {"repository": table.repository, "splits": list(table.splits)} for name, table in TABLES.items()}
    sets |= {name: {"repository": repository, "splits": []} for name, (repository, _) in TRAINING.items()}
    lines = [f"{name:<14} {one['repository']:<30} {', '.join(one['splits'])}".rstrip() for name, one in sets.items()]
    print_result(as_json, sets, "\n".join(lines))
