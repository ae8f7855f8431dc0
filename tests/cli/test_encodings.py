"""Printing survives any encoding of the output, and bytes that are no text are refused in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys
from tokenpacker.cli import app, main

for command in json.load(open(sys.argv[1], encoding="utf-8")):
    sys.argv = ["tokenpacker", *command]
    print("$", *map(ascii, command), flush=True)
    code = None
    try:
        main()
    except SystemExit as end:
        code = end.code
    assert code == (2 if "missing" in command[-1] else 0), (command, code)
"""
GROUPS = [[], ["train"], ["data"]]
COMMANDS = ["ask", "chat", "count", "show", "evaluate", "speed", "compare", "convert", "models"]
IN_GROUPS = [["train", name] for name in ("tiny", "tiny-regions", "recipe", "recipes", "engines")]
IN_GROUPS += [["data", name] for name in ("check", "regions", "show")]
HELP = [[*command, "--help"] for command in [*GROUPS, *([name] for name in COMMANDS), *IN_GROUPS]]


@pytest.fixture
def japanese(picture):
    """A picture with a name that neither cp1252 nor ASCII can write."""
    return picture.rename(picture.with_name("猫 …×.png"))


@pytest.fixture
def data(tmp_path, japanese):
    """Two rows about that picture."""
    rows = [
        {"image": japanese.name, "conversations": [{"from": "human", "value": f"{question}\n<image>"}, answer]}
        for question, answer in (
            ("何?", {"from": "gpt", "value": "猫"}),
            ("what?", {"from": "gpt", "value": "cat " * 9}),
        )
    ]
    path = tmp_path / "データ.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_every_command_prints_in_any_encoding(encoding, tmp_path, tiny_model_dir, japanese, data):
    model = ["--model", str(tiny_model_dir)]
    commands = [
        *HELP,
        ["count", str(japanese), *model],
        ["count", str(japanese), *model, "--json"],
        ["count", f"{japanese}.missing"],
        ["ask", str(japanese), "何?", "--max-new-tokens", "30", *model],
        ["ask", str(japanese), "何?", "--max-new-tokens", "30", *model, "--json"],
        ["chat", *model],
        ["show", str(japanese), "--out", str(tmp_path / "頁.png"), *model],
        ["models"],
        ["train", "recipes"],
        ["train", "engines"],
        ["data", "regions", "list"],
        ["data", "check", str(data), *model, "--rejects", str(tmp_path / "捨.jsonl")],
        ["data", "show", str(data), "--out", str(tmp_path / "行.png")],
        ["speed", "--plan", "--model", "small"],
        ["speed", *model, "--rounds", "1", "--batch-sizes", "1", "--output-tokens", "2"],
        ["evaluate", "--tasks", "fine-print", "--limit", "2"],
    ]
    script = tmp_path / "commands.json"
    script.write_text(json.dumps(commands), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(script)],
        env=os.environ | {"PYTHONIOENCODING": encoding, "COLUMNS": "100"},
        input=b"what?\n",
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed = done.stdout.decode("cp1252" if encoding == "cp1252" else "utf-8")  # click takes ASCII for a mistake
    assert printed.count("$ ") == len(commands)
    (counted,) = (json.loads(line) for line in printed.splitlines() if line.startswith('{"images": [{'))
    assert counted["images"][0]["image"] == str(japanese), "JSON escapes what the encoding lacks"
    assert ("#####" if encoding == "cp1252" else "█████") in printed


UNDECODABLE = "caf\udce9.png"  # what Python makes of the Latin-1 bytes of café.png
ARGUMENTS = [
    ("ask", UNDECODABLE, "what?"),
    ("ask", "picture.png", "what is a caf\udce9?"),
    ("ask", "picture.png", "what?", "--box", "1,2,3,\udce9"),
    ("chat", "--model", "caf\udce9"),
    ("count", UNDECODABLE),
    ("show", UNDECODABLE, "--out", "page.png"),
    ("show", "picture.png", "--out", UNDECODABLE),
    ("evaluate", "--tasks", "easy-vqa,\udce9"),
    ("speed", "--shapes", "\udce9.json"),
    ("compare", "--output", "\udce9"),
    ("convert", "caf\udce9", "out"),
    ("convert", "here", "\udce9"),
    ("data", "check", "\udce9.json"),
    ("data", "show", "\udce9.json", "--out", "page.png"),
    ("data", "regions", "coco", "\udce9.json", "--images", ".", "--output", "out.jsonl"),
    ("train", "\udce9"),
    ("train", "align-7b", "--data", "\udce9.json"),
    ("train", "align-7b", "--set", "data.path=\udce9.json"),
    ("train", "tiny", "--output", "\udce9"),
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=ascii)
def test_an_argument_that_is_no_text_is_refused_in_one_line(one_line_error, arguments):
    message = one_line_error(*arguments)
    assert message.endswith("as of a text cut within an emoji or bytes that are not UTF-8); write it anew in UTF-8")


def test_standard_input_that_is_no_text_is_refused_too():
    done = subprocess.run(
        [sys.executable, "-m", "tokenpacker", "count", "--paper", "--size", "-"],
        input=b"3x4\ncaf\xe9\n",
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: line 2 of standard input: 'caf")
    assert done.stderr.count(b"\n") == 1
