"""The blocks about regions run as written; of trainings, evaluations and annotations the options are looked up."""

from __future__ import annotations

import json
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from tokenpacker.carried.recipes import find_recipe
from tokenpacker.data.annotations import FORMATS
from tokenpacker.evaluate import find_task

DOCS = Path(__file__).resolve().parents[2] / "docs"
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block of a page, and what the page says that it prints."""

    language: str
    code: str
    printed: str


def blocks_of(page):
    return [Block(*found) for found in FENCED.findall((DOCS / page).read_text())]


def lines_of(block):
    """The lines of a shell block, continued ones as one."""
    return block.code.replace("\\\n", "").splitlines()


REGIONS, DATA = blocks_of("regions.md"), blocks_of("regions-data.md")
COMMANDS = [line for block in (*REGIONS, *DATA) if block.language == "sh" for line in lines_of(block)]
LONG = [line for line in COMMANDS if re.match(r"tokenpacker (train|evaluate|data regions) ", line)]
LOOKING = [line for line in COMMANDS if re.match(r"tokenpacker data (check|show) ", line)]
RUN = [block for block in REGIONS if block.printed or block.language == "python"]


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder with the picture where a clone's root has it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(DOCS / "images", "docs/images")
    return tmp_path


def run_line(run, line):
    """What a line of a shell block prints on standard output."""
    typed, piped, command = line.rpartition(" | ")
    words = shlex.split(command)
    if words[0] == "cp":
        return shutil.copy(*words[1:]) and ""
    assert words[0] == "tokenpacker"
    lines = "\n".join(shlex.split(typed)[2:]) + "\n" if piped else None  # of `printf '%s\\n' ...`
    result = run(*words[1:], input=lines)
    assert result.exit_code == 0, result.output
    assert "error" not in result.stderr
    return result.stdout


def test_the_pages_hold_no_shell_line_that_is_not_tested():
    tested = [line for block in RUN if block.language == "sh" for line in lines_of(block)]
    assert [line for line in COMMANDS if line not in (*tested, *LOOKING, *LONG)] == [
        "cat coco.jsonl refcoco.jsonl refcoco+.jsonl pascal.jsonl partimagenet.jsonl > stage2.jsonl"
    ]
    assert min(map(len, (tested, LOOKING, LONG))) >= 2


def test_the_page_about_regions_prints_what_it_says_from_top_to_bottom(clone, run, capsys):
    for block in RUN:
        if block.language == "python":
            exec(block.code, {})
            printed = capsys.readouterr().out
        else:
            printed = "".join(run_line(run, line) for line in lines_of(block))
        assert printed.split("\n") == block.printed.split("\n"), block.code
    assert Image.open("talk.png").width > 0


def test_the_row_of_the_page_about_data_can_be_checked_and_shown(clone, run):
    (row,) = [block.code for block in DATA if block.language == "json"]
    Path("rows.json").write_text(row)
    check, show = LOOKING
    assert re.search(r"regions\s+2\b", run_line(run, check))
    run_line(run, show)
    assert Image.open("row.png").width >= Image.open("docs/images/sign.png").width


@pytest.mark.parametrize("command", LONG)
def test_what_a_long_command_names_is_there(run, command):
    words = shlex.split(command)[1:]
    name, subject = words[0], words[1]
    if name == "evaluate":
        assert all(map(find_task, words[words.index("--tasks") + 1].split(",")))
        path = ["evaluate"]
    elif name == "train":
        path = ["train", subject if subject.startswith("tiny") else find_recipe(subject) and "recipe"]
    else:
        assert words[2] in (*FORMATS, "list")
        path = words[:2]
    helped = run(*path, "--help", env={"COLUMNS": "200"}).stdout
    assert [word for word in words if word.startswith("--") and word not in helped] == []


def test_the_refs_reader_makes_json_of_a_pickle_and_runs_nothing_of_it(clone):
    (code,) = [block.code for block in DATA if block.language == "python"]

    def read(refs):
        Path("refs.p").write_bytes(pickle.dumps(refs))
        return subprocess.run([sys.executable, "-c", code, "refs.p", "refs.json"], capture_output=True, text=True)

    refs = [{"ref_id": 7, "sentences": [{"sent": "the left dog"}]}]
    assert read(refs).returncode == 0
    assert json.loads(Path("refs.json").read_text()) == refs
    assert "has no place in refs" in read([Path("x")]).stderr
