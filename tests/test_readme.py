"""Every block of the README runs, and its numbers are those that were measured."""

import doctest
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tokenpacker.checkpoints import convert
from tokenpacker.projectors import base

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]


def shown_in(console: str) -> list[tuple[str, str]]:
    """Commands of a `console` block, the lines with a `$` before them, with what the block shows below each."""
    parts = re.split(r"^\$ ", console, flags=re.MULTILINE)[1:]
    return [(command, shown) for command, _, shown in (part.partition("\n") for part in parts)]


SHOWN = [pair for language, code in BLOCKS if language == "console" for pair in shown_in(code)]
COMMANDS = [line for language, code in BLOCKS if language == "sh" for line in code.splitlines() if line.strip()]
COMMANDS += [command for command, shown in SHOWN if not shown]
SHOWN = [(command, shown) for command, shown in SHOWN if shown]
AS_SHOWN = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE  # `...` stands for times and for what may be long
WIDE = {**os.environ, "COLUMNS": "200"}  # narrow terminals would break long options
STAND_INS = {  # small checkpoints of the same kind, for what the README takes from the hub or from a training
    "sunshine-lwt/TokenPacker-HD-7b-9patch-144token": "complete",
    "lmsys/vicuna-7b-v1.5": "base",
    "checkpoints/pretrain": "stage-1",
    "checkpoints/lora": "lora",
}
# Installing and training are what CI and hours are for; their commands are checked to exist.
INSTALLING = ("make ", "pip ", "git ", "cd ", "export ")
LONG_NAMES = ("train", "evaluate", "chat", "compare", "probe", "serve", "batch", "ui", "export")
LONG = tuple(f"tokenpacker {name}" for name in LONG_NAMES)
SERVER = "http://127.0.0.1:8000"  # a block that calls it gets one


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with the README's pictures, to write into; projectors that a block registers go with the test."""
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readme_has_blocks_of_both_kinds():
    assert len(PYTHON) >= 3
    assert len(COMMANDS) >= 8


@pytest.fixture
def stand_ins(make_complete, make_stage_1, lora_folder, base_folder):
    """Name in the README -> folder."""
    folders = {"complete": make_complete(), "stage-1": make_stage_1(), "lora": lora_folder, "base": base_folder}
    return {name: str(folders[kind]) for name, kind in STAND_INS.items()}


@pytest.fixture
def server():
    """The address of `tokenpacker serve`."""
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    command = [sys.executable, "-m", "tokenpacker", "serve", "--engine", "embedded", "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield json.loads(process.stdout.readline())["address"]
        process.terminate()
        assert process.wait(timeout=60) == 0


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.strip().splitlines()[0][:40])
def test_a_python_block_does_what_it_shows(request, checkout, stand_ins, monkeypatch, code):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: stand_ins[name])
    if SERVER in code:
        code = code.replace(SERVER, request.getfixturevalue("server"))
    test = doctest.DocTestParser().get_doctest(code, {}, "README", None, 0)
    assert test.examples, "a python block without >>> proves nothing"
    report = []
    runner = doctest.DocTestRunner(optionflags=AS_SHOWN)
    runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


@pytest.mark.parametrize("command", [line for line in COMMANDS if not line.startswith((*INSTALLING, *LONG))])
def test_a_command_runs(checkout, stand_ins, command):
    printed_by(command, stand_ins)


@pytest.mark.parametrize(("command", "shown"), SHOWN, ids=[command for command, _ in SHOWN])
def test_a_command_prints_what_is_shown(checkout, stand_ins, command, shown):
    printed = printed_by(command, stand_ins)
    example, checker = doctest.Example(command, shown), doctest.OutputChecker()
    assert checker.check_output(shown, printed, AS_SHOWN), checker.output_difference(example, printed, AS_SHOWN)


def test_a_console_block_is_read_as_commands_with_their_outputs():
    block = '$ tokenpacker ask sign.png "$?"\nking\n\n370 tokens\n$ tokenpacker chat\n'
    assert shown_in(block) == [('tokenpacker ask sign.png "$?"', "king\n\n370 tokens\n"), ("tokenpacker chat", "")]


def printed_by(command: str, stand_ins: dict[str, str]) -> str:
    """What a command that must succeed prints for its reader, on standard output and error."""
    words = [stand_ins.get(word, word) for word in shlex.split(command, comments=True)]
    assert words[0] == "tokenpacker"
    if "4bit" in words:
        pytest.importorskip("bitsandbytes", reason="--dtype 4bit needs bitsandbytes")
    if "packer-hd-7b" in words and words[2] not in stand_ins.values():
        convert(next(iter(stand_ins.values())), "packer-hd-7b")  # as the first command of that section does
    done = subprocess.run(
        [sys.executable, "-m", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        env=WIDE,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith(LONG)])
def test_the_options_of_a_long_command_exist(command):
    words = shlex.split(command, comments=True)
    name = words[1:2]
    if name == ["train"]:
        name += ["tiny" if words[2] == "tiny" else "recipe"]
    helped = subprocess.run(
        [sys.executable, "-m", "tokenpacker", *name, "--help"], capture_output=True, text=True, timeout=120, env=WIDE
    )
    assert helped.returncode == 0, helped.stderr
    missing = [word for word in words if word.startswith("--") and word not in helped.stdout]
    assert missing == []


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("make ")])
def test_make_knows_the_target(command):
    target = shlex.split(command, comments=True)[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_every_file_that_is_linked_exists():
    linked = re.findall(r"\]\((?!https?://|#)([^)#]+)", README) + re.findall(r'src="(?!https?://)([^"]+)"', README)
    missing = [path for path in linked if not (ROOT / path).exists()]
    assert missing == []


def test_the_tables_show_what_was_measured():
    from benchmarks.measure_carried import BEGIN, END, MEASURED, REGIONS, render, render_regions

    measured = json.loads(MEASURED.read_text())
    for text, table in ((README, render(measured)), (REGIONS.read_text(encoding="utf-8"), render_regions(measured))):
        assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip() == table
