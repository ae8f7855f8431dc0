"""`tokenpacker compare`: how its options become a comparison; what it computes is tested beside the code."""

from __future__ import annotations

import pytest

from tokenpacker.compare import everything
from tokenpacker.compare.common_parts import Foundation


@pytest.fixture
def started(monkeypatch, tmp_path):
    """The comparisons that commands start, with the jobs; nothing is run, and the foundation is not looked for."""
    calls = []

    def compare(comparison, output, *, jobs, command):
        calls.append((comparison, jobs, command))
        output.mkdir(exist_ok=True)
        (output / "compare.md").write_text("| a table |\n")
        (output / "compare.json").write_text('{"groups": []}\n')
        return True

    monkeypatch.setattr(everything, "compare", compare)
    monkeypatch.setattr(Foundation, "find", lambda folder: Foundation(folder / "encoder", folder / "language"))
    monkeypatch.setattr(Foundation, "digest", "digest")
    return calls


def test_options_say_what_is_compared(run, started, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/tokenpacker", "compare", "--projectors", "mlp, ldp-v2"])
    options = ("--projectors", "mlp, ldp-v2", "--scale-factors", "3", "--seeds", "5,6", "--align-steps", 7)
    result = run("compare", "--output", tmp_path, "--foundation", tmp_path, *options, "--limit", 9, "--jobs", 3)
    assert (result.exit_code, result.stdout) == (0, "| a table |\n")
    comparison, jobs, command = started[0]
    assert (comparison.projectors, comparison.scale_factors, comparison.seeds) == (("mlp", "ldp-v2"), (3,), (5, 6))
    assert (comparison.steps, comparison.limit, comparison.quick, jobs) == ((7, 500), 9, False, 3)
    assert (comparison.foundation, comparison.num_workers) == ("digest", 0)
    assert command == "tokenpacker compare --projectors 'mlp, ldp-v2'"


def test_without_options_it_is_the_whole_comparison(run, started, tmp_path):
    run("compare", "--output", tmp_path, "--foundation", tmp_path)
    comparison, *_ = started[0]
    assert (comparison.scale_factors, comparison.seeds, comparison.limit) == ((2, 4), (0, 1, 2), None)
    assert (comparison.projectors, comparison.quick) == ((), False)


def test_quick_is_one_seed_few_steps_and_few_questions(run, run_json, started, tmp_path):
    assert run_json("compare", "--quick", "--output", tmp_path, "--foundation", tmp_path) == {"groups": []}
    comparison, *_ = started[0]
    assert comparison.quick
    assert len(comparison.seeds) == 1
    assert comparison.limit is not None
    assert max(comparison.steps) < 100


def test_a_quick_look_goes_to_a_folder_of_its_own(run, started, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("compare", "--foundation", tmp_path)
    run("compare", "--foundation", tmp_path, "--quick")
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["compare", "compare-quick"]


def test_lists_in_a_projectors_settings_keep_their_commas(run, started, tmp_path):
    projectors = "mlp,resampler:query_grid=[3,3]:num_heads=2,ldp-v2"
    run("compare", "--output", tmp_path, "--foundation", tmp_path, "--projectors", projectors)
    assert started[0][0].projectors == ("mlp", "resampler:query_grid=[3,3]:num_heads=2", "ldp-v2")


def test_a_real_recipe_takes_its_data_and_its_own_steps(run, started, tmp_path):
    data = ("--data-align", "a.json", "--data-instruct", "b.json", "--images-instruct", "pictures")
    run("compare", "--recipe", "align-7b+instruct-7b", *data, "--output", tmp_path)
    comparison, jobs, _ = started[0]
    assert (comparison.recipe, comparison.steps, comparison.limit) == (("align-7b", "instruct-7b"), (None, None), None)
    assert [(data.path, data.images) for data in comparison.data] == [("a.json", None), ("b.json", "pictures")]
    assert (comparison.vision_tower, jobs) == (None, 1)


def test_a_stopped_comparison_ends_with_75(run, started, tmp_path, monkeypatch):
    monkeypatch.setattr(everything, "compare", lambda *arguments, **options: False)
    result = run("compare", "--output", tmp_path, "--foundation", tmp_path)
    assert (result.exit_code, result.stdout) == (75, "")
    assert "call it again and it goes on" in result.stderr


def test_ctrl_c_outside_of_the_trainings_says_what_is_kept(run, started, tmp_path, monkeypatch):
    def interrupted(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(everything, "compare", interrupted)
    result = run("compare", "--output", tmp_path, "--foundation", tmp_path)
    assert (result.exit_code, result.stdout) == (75, "")
    assert result.stderr == f"stopped; what is finished stands in {tmp_path}: call it again and it goes on\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--projectors", "nonsense"), "projector 'nonsense' is unknown; use some of"),
        (("--scale-factors", "2;4"), "--scale-factors '2;4' must be whole numbers of at least 1"),
        (("--recipe", "align-7b"), "must be two names with a plus between"),
        (("--recipe", "align-7b+instruct-7b"), "data of align-7b are missing"),
        (("--data-align", "a.json"), "align-tiny draws its own pictures; leave it out"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(one_line_error, tmp_path, options, words):
    assert words in one_line_error("compare", "--output", tmp_path / "new", *options)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_no_foundation_is_refused(one_line_error, tmp_path):
    assert "has no encoder/result/model.safetensors" in one_line_error("compare", "--foundation", tmp_path)


def test_quick_belongs_to_the_tiny_recipes(one_line_error, tmp_path):
    data = ("--data-align", "a.json", "--data-instruct", "b.json")
    line = one_line_error("compare", "--recipe", "align-7b+instruct-7b", *data, "--quick")
    assert line == "--quick belongs to the tiny recipes; leave it out, or leave --recipe out"
