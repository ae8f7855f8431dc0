"""What holds for every command."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import typer

from tokenpacker.cli import app
from tokenpacker.cli.errors import mistake

GROUP = typer.main.get_command(app)
COMMANDS = [(name,) for name, command in GROUP.commands.items() if not hasattr(command, "commands")]
COMMANDS += [(group, name) for group in ("data", "train") for name in GROUP.commands[group].commands]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=60)


def test_help_loads_neither_torch_nor_transformers_nor_pillow():
    code = (
        "import sys; from tokenpacker.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'PIL', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    result = python("-c", code)
    assert "ask" in result.stdout
    assert result.stderr.strip() == "[]"


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_an_example_and_a_json_option(run, command):
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.stdout
    assert f"tokenpacker {' '.join(command)}".removesuffix(" recipe") in result.stdout
    assert "--json" in result.stdout


def test_the_module_runs_as_a_program_and_ends_a_mistake_with_exit_code_2():
    result = python("-m", "tokenpacker", "count", "nothing.png", "--paper", "--json")
    assert result.returncode == 2
    assert json.loads(result.stdout) == {"error": "nothing.png does not exist; check the path"}
    assert result.stderr == "error: nothing.png does not exist; check the path\n"


def test_version(run):
    from tokenpacker import __version__

    assert run("--version").stdout == f"tokenpacker {__version__}\n"


def test_a_bug_keeps_its_traceback(run, monkeypatch):
    def broken(*_args: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("tokenpacker.images.image_size", broken)
    assert isinstance(run("count", "--paper", "picture.png").exception, ZeroDivisionError)


def test_a_value_error_is_a_mistake_only_when_this_package_raised_it():
    from tokenpacker.tiling import tile_grids

    with pytest.raises(ValueError, match="max_tiles=0") as ours:
        tile_grids(0)
    with pytest.raises(ValueError, match="invalid literal") as theirs:
        int("x")
    assert mistake(ours.value) == "max_tiles=0 must be at least 1"
    assert mistake(theirs.value) is None


def test_an_os_error_names_the_file():
    assert mistake(PermissionError(13, "Permission denied", "page.png")) == "page.png: Permission denied"
