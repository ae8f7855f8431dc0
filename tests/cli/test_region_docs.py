"""Every block of the pages about regions runs; of trainings and of public annotations the options are looked up."""

from __future__ import annotations

import json
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tokenpacker.evaluate import find_task
from tokenpacker.train.recipes import find_recipe
from tokenpacker.train.regions import FORMATS

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCKS = [
    (language, code)
    for page in ("regions.md", "regions-data.md")
    for language, code in re.findall(r"^```(\w+)\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
]
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [line for language, code in BLOCKS if language == "sh" for line in code.splitlines() if line.strip()]
ASKING = [line for line in COMMANDS if "tokenpacker ask" in line or "tokenpacker chat" in line]
LOOKING = [line for line in COMMANDS if line.startswith(("tokenpacker data check", "tokenpacker data show"))]
LONG = [line for line in COMMANDS if line not in (*ASKING, *LOOKING) and line.startswith("tokenpacker")]
OWN_MODEL = re.compile(r" --model \S+")
SIZE = (286, 352)  # (height, width), as the pages' coordinates have it


@pytest.fixture
def place(tmp_path, monkeypatch, image_of):
    """A folder with the pictures, masks and data that the pages speak of."""
    monkeypatch.chdir(tmp_path)
    for name in ("sign.png", "before.png", "after.png"):
        image_of(*SIZE).save(name)
    for number, name in enumerate(("first.png", "second.png")):
        mask = Image.new("1", SIZE[::-1])
        mask.paste(1, (20 + 100 * number, 30, 90 + 100 * number, 80))
        mask.save(name)
    (row,) = [code for language, code in BLOCKS if language == "json"]
    picture = Path("data", json.loads(row)["image"])
    picture.parent.mkdir(parents=True)
    image_of(*SIZE).save(picture)
    Path("stage2.jsonl").write_text((json.dumps(json.loads(row)) + "\n") * 10)
    return tmp_path


def words_of(command, model):
    """The arguments behind `tokenpacker`, with another model."""
    words = shlex.split(OWN_MODEL.sub("", command), comments=True)
    assert words[0] == "tokenpacker"
    return [*words[1:], *(["--model", model] if words[1:3] != ["data", "show"] else [])]


def test_the_pages_have_commands_of_every_kind():
    assert min(map(len, (PYTHON, ASKING, LOOKING, LONG))) >= 2


@pytest.mark.parametrize("command", ASKING)
def test_a_question_is_answered(place, run, region_model_dir, command):
    typed, piped, command = command.rpartition(" | ")
    lines = typed.removeprefix("printf '").removesuffix("'").replace("\\n", "\n") if piped else None
    result = run(*words_of(command, region_model_dir), "--max-new-tokens", 4, input=lines)
    assert result.exit_code == 0, result.output
    assert "error" not in result.stderr
    assert result.stderr.count("first token after") == (2 if piped else 1)


@pytest.mark.parametrize("command", LOOKING)
def test_data_are_looked_at(place, run, tiny_model_dir, command):
    result = run(*words_of(command, tiny_model_dir))
    assert result.exit_code == 0, result.output
    if "row.png" in command:
        assert Image.open("row.png").width >= SIZE[1]
    else:
        assert re.search(r"regions\s+20\b", result.stdout), result.stdout


@pytest.mark.parametrize("command", LONG)
def test_what_a_long_command_names_is_there(run, command):
    words = shlex.split(command, comments=True)[1:]
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


@pytest.mark.parametrize("code", [code for code in PYTHON if "pickle" not in code])
def test_python_gives_an_answer(place, region_model, region_model_dir, code):
    model, processor = region_model
    image = Image.open("sign.png")
    known = {"model": model, "processor": processor, "image": image, "mask": Image.open("first.png")}
    exec(code.replace('"runs/tiny-regions"', repr(str(region_model_dir))), known)
    assert len(known["answer"])


def test_the_refs_reader_makes_json_of_a_pickle_and_runs_nothing_of_it(place):
    (code,) = [code for code in PYTHON if "pickle" in code]

    def read(refs):
        Path("refs.p").write_bytes(pickle.dumps(refs))
        return subprocess.run([sys.executable, "-c", code, "refs.p", "refs.json"], capture_output=True, text=True)

    refs = [{"ref_id": 7, "sentences": [{"sent": "the left dog"}]}]
    assert read(refs).returncode == 0
    assert json.loads(Path("refs.json").read_text()) == refs
    assert "has no place in refs" in read([Path("x")]).stderr
