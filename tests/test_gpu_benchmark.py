"""The GPU benchmark: what is measured lands in JSON and page, and what fails or hangs takes nothing with it."""

from __future__ import annotations

import json
import sys
import time

import pytest
import torch
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import inference, page
from benchmarks.gpu.run import Run
from benchmarks.gpu.training import fsdp2

TIMES = {"straightforward": {"device_ms": [2.0, 2.2, 1.8]}, "package": {"device_ms": [1.0, 1.1, 0.9]}}
MACHINE = {"gpu": "NVIDIA H100", "processor": "x86", "cores": 16, "versions": {"torch": "2.11.0"}}


@pytest.fixture
def run(tmp_path):
    """A part on the CPU, in this process."""
    settings = {"part": "one", "device": "cpu", "small": True, "started": time.time(), "deadline": time.time() + 600}
    return Run.of(settings | {"file": str(tmp_path / "result.json")})


def shown(found, name, tmp_path) -> str:
    report = {"parts": {name: {"notes": [], "small": False, "machine": MACHINE} | found}}
    page.write_page(report, tmp_path / "gpu.md")
    return (tmp_path / "gpu.md").read_text()


def cells(text, first) -> list[str]:
    """What follows the first cell in the one line of a table that begins with it."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    (found,) = [line[1:] for line in lines if line[0] == first]
    return found


def row(batch, scale, backward, **modes):
    return {"batch": batch, "scale_factor": scale, "backward": backward, "difference": 0.01, "modes": modes}


@pytest.mark.slow
def test_the_small_benchmark_writes_figures_and_their_tables(tmp_path):
    command.main(
        ["--device", "cpu", "--small", "--parts", "model,training", "--budget", "2000", "--output", str(tmp_path)]
    )
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert list(parts) == ["model", "training"]
    assert [part["notes"] for part in parts.values()] == [[], []]
    one_tile, hd = parts["model"]["rows"]
    assert [row["counted"]["image_tokens"] for row in one_tile["rows"]] == [144, 36, 16, 9]
    assert [row["counted"]["tiles"] for row in hd["rows"]] == [10] * 4
    (step,) = parts["training"]["rows"]
    assert step["measured_gib"] > 0 < step["estimated_gib"]["total"]
    assert len(step["step_s"]) == 2
    text = (tmp_path / "gpu.md").read_text()
    assert text.startswith("# On a GPU")
    assert "tiny sizes, no figures" in text
    assert "| tiles: 10 | token-packer, s = 4 |" in text
    assert "| instruct-7b-lora |" in text
    assert "Not run: not asked for." in text


@pytest.mark.slow
def test_projector_and_shards_are_measured_beside_what_they_are_compared_with(run, monkeypatch):
    monkeypatch.setattr(inference, "MODES", inference.MODES[:1])  # the compiler takes half a minute
    inference.projector(run)
    rows = run.found["rows"]
    assert [(row["batch"], row["backward"]) for row in rows] == [(1, False), (1, True)]
    assert [list(row["modes"]) for row in rows] == [["plain"], ["plain"]]
    run.found["rows"] = []
    fsdp2(run)
    whole, sharded = run.found["rows"]
    assert whole["losses"] == pytest.approx(sharded["losses"], abs=1e-4)
    assert not torch.distributed.is_initialized()


def test_a_row_that_fails_or_comes_too_late_is_a_note_and_the_others_stay(run):
    assert run.attempt("first", lambda: {"value": 1})
    assert not run.attempt("second", lambda: 1 / 0)
    run.deadline = time.time()
    assert not run.attempt("third", lambda: {"value": 3})
    found = json.loads(run.file.read_text())
    assert found["rows"] == [{"value": 1}]
    assert found["notes"] == ["second: ZeroDivisionError: division by zero", "third: not run, the time is spent"]


def test_a_part_that_hangs_or_dies_ends_with_a_line():
    assert command._run([sys.executable, "-c", "import time; time.sleep(60)"], 0.5) == "stopped after its 0 s"
    assert command._run([sys.executable, "-c", "raise SystemExit(3)"], 60) == "its process ended with status 3"
    assert command._run([sys.executable, "-c", ""], 60) is None


def test_what_is_not_installed_or_has_no_time_left_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == "peft" else name)
    asked = ["--device", "cpu", "--small", "--parts", "training,model", "--budget", "1", "--output", str(tmp_path)]
    command.main(asked)
    text = (tmp_path / "gpu.md").read_text()
    assert "Not run: peft is not installed." in text
    assert "Not run: the 1 s were spent." in text


def test_parts_that_are_not_asked_for_keep_their_figures(tmp_path):
    kept = {"parts": {"tests": {"not_run": "pytest is not installed"}}}
    (tmp_path / "gpu.json").write_text(json.dumps(kept))
    command.main(["--device", "cpu", "--small", "--parts", "model", "--budget", "1", "--output", str(tmp_path)])
    assert "Not run: pytest is not installed." in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "add --small"),
        (["--parts", "model,foo"], "part 'foo' is unknown; use some of tests,model"),
        (["--device", "cuda"], "torch sees no GPU; try --device cpu --small"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


def test_the_page_shows_every_mode_of_a_pass_in_one_line(tmp_path):
    plain = {"times": TIMES, "speedup": 2.0, "peak_mib": {"straightforward": 90.0, "package": 45.0}}
    graph = {"times": TIMES, "speedup": 2.5}
    rows = [row(64, 2, False, plain=plain, **{"CUDA graph": graph}), row(64, 2, False, compiled=graph)]
    text = shown({"rows": rows}, "projector", tmp_path)
    assert "NVIDIA H100, 16 processor cores; torch 2.11.0." in text
    times = ["2.00 / 1.00 (2.00 x)", "2.00 / 1.00 (2.50 x)", "2.00 / 1.00 (2.50 x)"]
    assert cells(text, "64") == ["2", "forward", *times, "90 / 45"]


def test_the_page_shows_failed_tests_memory_and_four_bits(tmp_path):
    tests = {"passed": 3, "failed": {"a.py::b": "assert 1 == 2"}, "skipped": {"a.py::c": "no bitsandbytes"}}
    text = shown({"rows": [tests]}, "tests", tmp_path)
    assert "3 passed, 1 failed, 1 skipped." in text
    assert "- failed: `a.py::b`: assert 1 == 2" in text
    step = {"recipe": "instruct-7b-lora", "rows": 16, "row_tokens": 2048, "measured_gib": 50.0, "step_s": [9.0, 4.0]}
    step["estimated_gib"] = {"frozen weights": 13.0, "total": 41.0}
    text = shown({"rows": [step]}, "training", tmp_path)
    assert cells(text, "instruct-7b-lora") == ["16 x 2048", "50.00", "41.00", "4.00"]
    shards = {"what": "tokenpacker train", "losses": [2.0, 1.5], "seconds": 20.0, "peak_gib": None}
    text = shown({"rows": [shards]}, "fsdp2", tmp_path)
    assert cells(text, "tokenpacker train") == ["2.0000, 1.5000", "20.0", "-"]
    bits = {"weights": "4bit", "load_s": 3.0, "weights_mib": 1200.0, "planned_mib": 1190.0, "finite": True}
    text = shown({"rows": [bits], "notes": ["whole: RuntimeError: no"]}, "four-bit", tmp_path)
    assert cells(text, "4bit") == ["1,200", "1,190", "3.0"]
    assert "- whole: RuntimeError: no" in text
