from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tokenpacker.cli import app


@pytest.fixture
def run() -> Callable[..., Result]:
    """Runs a command: `run("count", "--size", "3x4", input="...")`; arguments may be paths and numbers."""

    def invoke(*arguments: object, input: str | None = None, **options: Any) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=input, **options)

    return invoke


@pytest.fixture
def run_json(run) -> Callable[..., dict[str, Any]]:
    """Runs a command with `--json` and gives the one object that it prints."""

    def invoke(*arguments: object, **options: Any) -> dict[str, Any]:
        result = run(*arguments, "--json", **options)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return invoke


@pytest.fixture
def one_line_error(run) -> Callable[..., str]:
    """Runs a command that must fail with exit code 2 and gives the one line that it says."""

    def invoke(*arguments: object, **options: Any) -> str:
        result = run(*arguments, **options)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        lines = result.stderr.splitlines()
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")

    return invoke


@pytest.fixture
def picture(tmp_path, image_of) -> Path:
    """A file that the tiny model cuts into several tiles."""
    path = tmp_path / "picture.png"
    image_of(60, 90).save(path)
    return path
