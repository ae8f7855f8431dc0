from __future__ import annotations

import json

import pytest

from tokenpacker.compare.probe import probing
from tokenpacker.compare.probe.probing import probe
from tokenpacker.compare.results import RESULTS, read_rows
from tokenpacker.whole_files import only_writer

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

PROJECTORS = ("average-pool", "pixel-shuffle", "mlp")
TIMES = ("step_ms", "seconds", "date", "machine")


def results(folder) -> list[dict]:
    """The rows, without what a clock measured."""
    return [{name: value for name, value in row.items() if name not in TIMES} for row in read_rows(folder / RESULTS)]


@pytest.fixture
def no_report(monkeypatch):
    """Draws no figures, which take longer than the runs."""
    monkeypatch.setattr(probing, "write_report", lambda *arguments: None)


def test_a_probe_that_was_interrupted_goes_on_to_the_same_rows(small_probe, tmp_path, monkeypatch, capsys, no_report):
    asked = small_probe(projectors=PROJECTORS, tokens=(25, 1))
    probe(asked, tmp_path / "whole", jobs=1)
    real, calls = probing.read, []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(probing, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        probe(asked, tmp_path / "parts", jobs=1)
    assert len(results(tmp_path / "parts")) == 2
    with (tmp_path / "parts" / RESULTS).open("a") as file:
        file.write('{"kind": "run", "prot')  # as a kill leaves it
    capsys.readouterr()
    probe(asked, tmp_path / "parts", jobs=1)
    assert "5 runs, 3 to do: about" in capsys.readouterr().err
    assert results(tmp_path / "parts") == results(tmp_path / "whole")
    assert len(calls) == 3 + 3
    probe(asked, tmp_path / "parts", jobs=1)
    assert len(calls) == 3 + 3


def test_rows_of_other_settings_stay_and_are_not_reported(small_probe, tmp_path):
    probe(small_probe(steps=(2,)), tmp_path, jobs=1)
    probe(small_probe(steps=(2,), split="dev"), tmp_path, jobs=1)
    probe(small_probe(steps=(3,)), tmp_path, jobs=1)
    assert [(row["steps"], row["split"]) for row in results(tmp_path)] == [(2, "test"), (2, "dev"), (3, "test")]
    report = json.loads((tmp_path / "probe.json").read_text())
    assert [(group["steps"], report["split"]) for group in report["groups"]] == [(3, "test")]


def test_a_skipped_projector_is_named_with_its_reason(small_probe, tmp_path, capsys):
    probe(small_probe(projectors=("average-pool", "pixel-shuffle"), steps=(2,)), tmp_path, jobs=1)
    line = "pixel-shuffle at 9 tokens is left out: scale_factor=2 does not divide patch_grid=5x5"
    assert line in capsys.readouterr().err
    assert line in (tmp_path / "probe.md").read_text()
    assert [entry["projector"] for entry in json.loads((tmp_path / "probe.json").read_text())["skipped"]] == [
        "pixel-shuffle"
    ]


def test_runs_side_by_side_have_the_same_results(small_probe, tmp_path, no_report):
    asked = small_probe(projectors=("average-pool", "mlp"), steps=(2,))
    probe(asked, tmp_path / "one", jobs=1)
    probe(asked, tmp_path / "two", jobs=2)
    one, two = (sorted(results(tmp_path / name), key=lambda row: row["fingerprint"]) for name in ("one", "two"))
    for ours, theirs in zip(one, two, strict=True):
        assert ours.pop("loss") == pytest.approx(theirs.pop("loss"), rel=1e-4)  # other threads add in another order
        assert ours == theirs


def test_a_second_process_does_not_write_the_same_output(small_probe, tmp_path):
    with only_writer(tmp_path / RESULTS), pytest.raises(ValueError, match="another process is writing"):
        probe(small_probe(), tmp_path, jobs=1)
