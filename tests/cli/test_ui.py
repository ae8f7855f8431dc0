"""`tokenpacker ui` before its page is there; tests/ui has the page."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tokenpacker.cli.model_files import find_model


def test_a_missing_extra_is_told_in_one_line(one_line_error, monkeypatch):
    monkeypatch.setattr("tokenpacker.cli.commands.serving.ui.find_spec", lambda name: None)
    assert "pip install 'tokenpacker[ui]'" in one_line_error("ui")


def test_a_password_must_be_there(one_line_error, monkeypatch):
    monkeypatch.setenv("PAGE_LOGIN", "only-a-user")
    assert "user:password" in one_line_error("ui", "--auth-env", "PAGE_LOGIN")


def test_options_of_the_server_are_refused_for_a_static_page(one_line_error, tmp_path):
    assert "--static" in one_line_error("ui", "--static", tmp_path, "--auth-env", "X")


def test_a_folder_that_is_there_stays_unless_it_may_be_replaced(one_line_error, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    assert str(tmp_path) in one_line_error("ui", "--static", tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.fixture
def unloaded(monkeypatch):
    """Fails a test that loads a model."""
    monkeypatch.setattr("tokenpacker.cli.commands.serving.ui.load_model", lambda *_: pytest.fail("it loads"))


@pytest.mark.parametrize("out", ["models/mine", "models/mine/", "models/../models/mine", "models", "link"])
@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_the_model_that_a_page_shows_is_never_replaced(one_line_error, tmp_path, monkeypatch, unloaded, out, overwrite):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(find_model(None), "models/mine")
    shutil.copy("models/mine/config.json", "models")  # so that it may be replaced
    Path("link").symlink_to("models/mine", target_is_directory=True)
    weights = Path("models/mine/model.safetensors").read_bytes()
    message = one_line_error("ui", "--model", "models/mine", "--static", out, *overwrite)
    assert message.endswith("models/mine, which is read; choose another folder to write")
    assert Path("models/mine/model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    "option", [("--host", "0.0.0.0"), ("--port", 80), ("--max-batch", 4), ("--allow-host", "a.example")]
)
def test_no_option_of_the_server_is_ignored_for_a_static_page(one_line_error, tmp_path, option):
    assert option[0] in one_line_error("ui", "--static", tmp_path / "site", *option)


def test_overwrite_belongs_to_the_static_page(one_line_error):
    assert "--overwrite belongs to --static" in one_line_error("ui", "--overwrite")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_free_port_is_printed_and_ctrl_c_ends_the_page_cleanly(tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed")
    command = [sys.executable, "-m", "tokenpacker", "ui", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+", line)[0]
        with httpx.stream("GET", f"{address}/gradio_api/heartbeat/x", timeout=30):  # an open page
            process.send_signal(signal.SIGINT)
            start = time.monotonic()
            assert process.wait(30) == 0
        assert time.monotonic() - start < 20
        assert "Traceback" not in process.stderr.read()
