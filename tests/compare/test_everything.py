"""Whole comparisons, of one step a stage: what they write, and how they go on."""

from __future__ import annotations

import json

import pytest

from tokenpacker.compare import everything
from tokenpacker.compare.everything import compare
from tokenpacker.compare.results import RUN, SPEED, read_rows
from tokenpacker.compare.runs import STAGES
from tokenpacker.compare.tiles import HD, ONE_TILE

BUILT_IN = (
    *("average-pool", "c-abstractor", "dense-connector", "ldp-v2"),
    *("mlp", "pixel-shuffle", "resampler", "token-packer"),
)


@pytest.fixture(scope="module")
def finished(comparison_of, tmp_path_factory):
    """A comparison of all projectors with one seed, and its folder."""
    comparison, output = comparison_of(projectors=BUILT_IN), tmp_path_factory.mktemp("compare")
    assert compare(comparison, output, command="tokenpacker compare --quick")
    return comparison, output


def report_of(output):
    return json.loads((output / "compare.json").read_text())


def test_every_projector_trains_and_is_asked_in_both_modes(finished):
    _, output = finished
    rows = [row for row in read_rows(output / "results.jsonl") if row["kind"] == RUN]
    assert [row["projector"] for row in rows] == list(BUILT_IN)
    for row in rows:
        assert row["steps"] == {"align": 1, "instruct": 1}
        assert row["tokens_per_tile"] == (16 if row["projector"] == "mlp" else 4)
        scores = row["scores"]
        assert {task: score[HD]["questions"] for task, score in scores.items()} == {"easy-vqa": 6, "fine-print": 6}
        one_tile = row["tokens_per_tile"] + 1  # and a separator
        assert scores["fine-print"][ONE_TILE]["image_tokens"] == one_tile
        assert scores["fine-print"][HD]["image_tokens"] > 2 * one_tile


def test_all_of_a_scale_factor_learn_from_the_same_data(finished):
    _, output = finished
    rows = [row for row in read_rows(output / "results.jsonl") if row["kind"] == RUN]
    for stage in STAGES:
        assert len({row["data"][stage] for row in rows if row["projector"] != "mlp"}) == 1


def test_times_are_measured_once_for_all_side_by_side(finished):
    _, output = finished
    (speed,) = [row for row in read_rows(output / "results.jsonl") if row["kind"] == SPEED]
    measured = [(row["mode"], row["projector"]) for row in speed["rows"]]
    assert measured == [(mode, name) for mode in (ONE_TILE, HD) for name in BUILT_IN]
    assert {row["tiles"] for row in speed["rows"]} == {1, 10}
    assert all(row["milliseconds"]["first_token"]["median"] > 0 for row in speed["rows"])
    assert all(set(row["multiplications"]) == {"vision", "projector", "prefill"} for row in speed["rows"])


def test_a_finished_comparison_is_not_run_again(finished, monkeypatch):
    comparison, output = finished
    before = (output / "results.jsonl").read_bytes()
    for work in ("run_one", "measure_speed", "encode_test_tiles"):
        monkeypatch.setattr(everything, work, lambda *given, **options: pytest.fail("there is nothing left to do"))
    assert compare(comparison, output)
    assert (output / "results.jsonl").read_bytes() == before


def test_rows_are_carried_on_elsewhere(finished, comparison_of, tmp_path, monkeypatch, capsys):
    comparison, output = finished
    lines = (output / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "results.jsonl").write_text("".join(lines[1:]))  # without the first run
    trained = []

    def run_one(comparison, run, output, command):
        trained.append(run)
        return json.loads(lines[0])

    monkeypatch.setattr(everything, "run_one", run_one)
    assert compare(comparison, tmp_path)
    assert [run.projector for run in trained] == ["average-pool"]
    assert "8 of 8: average-pool, 4 tokens, seed 0: easy-vqa hd 0" in capsys.readouterr().err
    table = (tmp_path / "compare.md").read_text()
    assert table == (output / "compare.md").read_text()


def test_rows_of_other_settings_do_not_count(finished, comparison_of, tmp_path, monkeypatch):
    _, output = finished
    (tmp_path / "results.jsonl").write_bytes((output / "results.jsonl").read_bytes())
    longer = comparison_of(projectors=("mlp", "ldp-v2"), steps=(1, 2))
    asked = []
    monkeypatch.setattr(everything, "run_one", lambda comparison, run, output, command: asked.append(run.projector))
    assert not compare(longer, tmp_path)  # stopped by a signal, as far as this stand-in tells
    assert asked == ["mlp"]


def test_models_stay_and_checkpoints_go(finished):
    comparison, output = finished
    for run in comparison.runs():
        folder = output / "runs" / comparison.fingerprint(run)
        assert (folder / "instruct" / "model" / "model.safetensors").is_file()
        assert not [*folder.glob("*/checkpoints")]


def test_the_report_leaves_out_what_else_was_compared_in_the_folder(finished, comparison_of, tmp_path):
    comparison, output = finished
    (tmp_path / "results.jsonl").write_bytes((output / "results.jsonl").read_bytes())
    others = comparison_of(projectors=("mlp", "ldp-v2"))
    assert compare(others, tmp_path)
    assert {group["projector"] for group in report_of(tmp_path)["groups"]} == {"mlp", "ldp-v2"}
    assert compare(comparison, tmp_path)
    report = report_of(tmp_path)
    assert {group["projector"] for group in report["groups"]} == set(BUILT_IN)
    assert all(group["speed"] for group in report["groups"])


@pytest.mark.slow
def test_a_run_that_fails_does_not_cost_the_one_beside_it(comparison_of, tmp_path):
    comparison = comparison_of(projectors=("average-pool", "mlp"))
    bad, good = (comparison.fingerprint(run) for run in comparison.runs())
    model = tmp_path / "runs" / bad / "align" / "model"
    model.mkdir(parents=True)
    (model.parent / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"^average-pool, s = 2, seed 0: .* is damaged"):
        compare(comparison, tmp_path, jobs=2)
    assert [row["fingerprint"] for row in read_rows(tmp_path / "results.jsonl")] == [good]


@pytest.mark.slow
def test_runs_side_by_side_give_the_rows_of_runs_in_turn(finished, comparison_of, tmp_path, monkeypatch, capsys):
    _, output = finished
    names = ("average-pool", "mlp")
    monkeypatch.setattr("tokenpacker.progress.FIRST_LINE_SECONDS", 0)
    monkeypatch.setattr(everything, "LOOK_SECONDS", 0.5)  # the processes take longer to import torch
    assert compare(comparison_of(projectors=names), tmp_path, jobs=2)
    shown = capsys.readouterr().err
    assert "runs: 0 of 2 (" in shown
    assert "; average-pool, s = 2, seed 0: starting; mlp, s = 1, seed 0: starting" in shown
    expected = {row["projector"]: row for row in read_rows(output / "results.jsonl") if row["kind"] == RUN}
    rows = {row["projector"]: row for row in read_rows(tmp_path / "results.jsonl") if row["kind"] == RUN}
    assert set(rows) == set(names)
    for name, row in rows.items():
        for key in ("fingerprint", "data", "tokens_per_tile", "settings"):
            assert row[key] == expected[name][key]
        for stage in STAGES:  # threads sum in another order
            assert row["losses"][stage] == pytest.approx(expected[name]["losses"][stage], abs=1e-3)
        assert "seed 0" in (tmp_path / "runs" / row["fingerprint"] / "log.txt").read_text()
