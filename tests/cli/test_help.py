"""`--help` of each command fits a screen and has examples, which run; a command is found by what others call it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from PIL import Image, ImageDraw

from tokenpacker.cli import app
from tokenpacker.cli.command_group import OTHER_NAMES

ROOT = typer.main.get_command(app)
GROUPS = [(), ("data",), ("train",)]
COMMANDS = [(name,) for name in ROOT.commands if (name,) not in GROUPS]
COMMANDS += [(*group, name) for group in GROUPS[1:] for name in ROOT.commands[group[0]].commands]
SCREEN, MANY_OPTIONS = 32, 39  # lines, at 100 columns
LONG = {(), ("batch",), ("serve",), ("convert",), ("evaluate",), ("speed",), ("compare",), ("data", "check")}
QUICK = ("ask", "count", "show", "models", "train recipes", "train engines", "data regions list", "speed --plan")


def examples(command: tuple[str, ...]) -> list[str]:
    """The lines below `Examples:` in the help of a command."""
    found = ROOT
    for name in command:
        found = found.commands[name]
    return [line.strip() for line in found.help.partition("Examples:")[2].splitlines() if line.strip()]


def arguments(example: str) -> list[str]:
    """The words behind `tokenpacker` in a line for a shell, up to a pipe or a redirection."""
    return shlex.split(re.search(r"\btokenpacker (.*?)( --json)?( \||\)| >|$)", example)[1])


EXAMPLES = [(command, example) for command in COMMANDS for example in examples(command)]


@pytest.mark.parametrize("command", [*GROUPS, *COMMANDS], ids=lambda command: " ".join(command) or "tokenpacker")
def test_the_help_of_a_command_fits_a_screen(run, command):
    result = run(*command, "--help", env={"COLUMNS": "100"})
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) <= (MANY_OPTIONS if command in LONG else SCREEN)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the files that the examples name."""
    monkeypatch.chdir(tmp_path)
    image = Image.effect_noise((192, 192), 80).convert("RGB")
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).rectangle((10, 10, 60, 60), fill=255)
    mask.save("mask.png")
    for name in ("sign.png", "signs.png", "before.png", "after.png", "photo.jpg", "scan.png"):
        image.save(name)


@pytest.mark.parametrize(("command", "example"), EXAMPLES, ids=[example for _, example in EXAMPLES])
def test_the_options_of_an_example_are_taken(here, command, example):
    for word in arguments(example)[len(command) :]:
        if not Path(word).exists() and not word.startswith("-") and " " not in word:  # data must exist
            Path(word).parent.mkdir(parents=True, exist_ok=True)
            Path(word).touch() if Path(word).suffix else Path(word).mkdir()
    words = arguments(example)
    context = ROOT.make_context("tokenpacker", words)
    name, found, rest = ROOT.resolve_command(context, words)
    if len(command) > 1:
        context = found.make_context(name, rest, parent=context)
        name, found, rest = found.resolve_command(context, rest)
    assert found.make_context(name, rest, parent=context).params


RUN = [example for _, example in EXAMPLES if " ".join(arguments(example)).startswith(QUICK)]


@pytest.mark.parametrize("example", [line for line in RUN if "FOLDER" not in line])
def test_a_quick_example_runs(run, here, example):
    result = run(*arguments(example), input="480x640\n")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("eval", "evaluate"),
        ("benchmark", "speed"),
        ("generate", "ask"),
        ("run", "ask"),
        ("download", "models"),
        ("list", "models"),
        ("finetune", "train"),
        ("tokens", "count"),
        ("visualize", "show"),
        ("shwo", "show"),
        ("data validate", "check"),
        ("train list", "recipes"),
    ],
)
def test_an_unknown_command_names_the_one_that_was_meant(one_line_error, typed, meant):
    assert one_line_error(*typed.split()).endswith(f"has no command {typed.split()[-1]}; did you mean {meant}?")


def test_another_name_means_one_command_of_its_group():
    for group in GROUPS:
        names = (ROOT.commands[group[0]] if group else ROOT).commands
        words = [word for name in names for word in OTHER_NAMES.get(name, "").split()]
        assert len(set(words)) == len(words)
        assert not set(words) & set(names) - {"recipes", "recipe"}


def test_a_wrong_command_line_is_told_in_one_line(one_line_error):
    assert one_line_error("show", "--out", "page.png").startswith("missing argument 'IMAGE")
    assert one_line_error("evaluate", "--limt", 3).startswith("no such option: --limt")
    assert one_line_error("evaluate", "--limit", "x").startswith("invalid value for '--limit': ")
    assert one_line_error("--nope").startswith("no such option: --nope; ")
    assert one_line_error("nonsense").startswith("tokenpacker has no command nonsense; it has ask, chat, count, ")


def test_without_a_command_the_help_is_shown(run):
    assert run().stdout.strip() == run("--help").stdout.strip()
