"""Ctrl-C ends every long command with one line: what is kept, and how to go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest


@pytest.fixture
def here(tmp_path, monkeypatch, image_of):
    monkeypatch.chdir(tmp_path)
    image_of(30, 40).save("picture.png")
    (tmp_path / "data.json").write_text("[]")


STOPPED = [  # command, where Ctrl-C comes, what is said
    (
        ("convert", "tiny", "out", "--to", "original"),
        "tokenpacker.checkpoints.export_original",
        "stopped; nothing is kept, for out appears when it is complete; call it again to start anew",
    ),
    (
        ("speed", "--shapes", "small"),
        "tokenpacker.speed.speed_run.measure",
        "stopped; nothing was measured to its end; call it again, with a smaller --rounds to be sooner done",
    ),
    (
        ("data", "regions", "coco", "data.json", "--images", ".", "--output", "out.jsonl"),
        "tokenpacker.data.annotations.write_rows",
        "stopped; out.jsonl was not written; call it again to start anew",
    ),
    (
        ("data", "check", "data.json"),
        "tokenpacker.data.check.check_data",
        "stopped; nothing but the rejects so far is kept; call it again, with --sample N for a quicker look",
    ),
    (
        ("show", "picture.png", "--out", "page.png"),
        "tokenpacker.images.load_image",
        "stopped; nothing is kept: call it again to start anew",
    ),
]


@pytest.mark.parametrize(("command", "place", "said"), STOPPED, ids=[command[0] for command, *_ in STOPPED])
def test_ctrl_c_says_what_is_kept_and_how_to_go_on(run, here, monkeypatch, command, place, said):
    def interrupted(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tokenpacker.data.sources.open_data", lambda *_args: [])
    monkeypatch.setattr(place, interrupted)
    result = run(*command)
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr.splitlines()[-1] == said


@pytest.mark.slow
def test_a_real_signal_without_a_terminal():
    command = [sys.executable, "-m", "tokenpacker", "speed", "--shapes", "small", "--rounds", "1000"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
    ) as process:
        assert process.stderr is not None
        # a plain line says how far it is; builds of torch may write one of their own before
        assert any(line.startswith("speed: ") for line in process.stderr)
        process.send_signal(signal.SIGINT)
        printed, said = process.communicate(timeout=60)
    assert (process.returncode, printed) == (130, "")
    assert said.splitlines()[-1].startswith("stopped; nothing was measured to its end; call it again")
