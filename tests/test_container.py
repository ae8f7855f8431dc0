"""The container files, as far as they can be checked without a container engine."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from tokenpacker.cli import app

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))


def program(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def test_the_linter_finds_nothing_in_the_dockerfile():
    result = subprocess.run([program("hadolint"), "Dockerfile"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "")


def test_the_compose_file_fits_its_schema():
    command = [program("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", "compose.yaml"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout


def test_what_is_copied_is_not_ignored():
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {name for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()}
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)


def test_the_commands_are_options_of_serve():
    known = {name for option in typer.main.get_command(app).commands["serve"].params for name in option.opts}
    lines = re.findall(r"^(?:ENTRYPOINT|CMD) (\[.*\])$", DOCKERFILE, re.MULTILINE)
    words = [word for line in lines for word in json.loads(line)]
    words += [word for service in COMPOSE["services"].values() for word in service["command"]]
    used = {word for word in words if word.startswith("--")}
    assert {"--host", "--port", "--engine", "--api-key-env"} <= used <= known


def test_a_service_asks_for_a_key_and_listens_on_this_machine_only():
    for service in COMPOSE["services"].values():
        assert "--api-key-env" in service["command"]
        assert service["environment"]["TOKENPACKER_API_KEY"].startswith("${TOKENPACKER_API_KEY:?")
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
