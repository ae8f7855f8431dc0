"""One way to find a model for all commands: a carried name, a folder, a hub id, the name of a released checkpoint."""

from __future__ import annotations

import pytest

from tokenpacker.hub import carried_models

MODEL_COMMANDS = [
    ("ask", "picture.png", "what?"),
    ("chat",),
    ("count", "--size", "3x4"),
    ("show", "picture.png", "--out", "page.png"),
    ("evaluate",),
    ("speed",),
    ("speed", "--plan"),
    ("data", "check", "data.json"),
]
COMMANDS = [(*command, "--model") for command in MODEL_COMMANDS]
COMMANDS += [("train", "instruct-tiny", "--dry-run", "--start"), ("train", "tiny-regions", "--start")]


@pytest.fixture
def here(tmp_path, monkeypatch, image_of):
    """A folder with what the commands want beside a model."""
    monkeypatch.chdir(tmp_path)
    image_of(30, 40).save("picture.png")
    (tmp_path / "data.json").write_text("[]")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_slip_of_a_carried_name_is_told_with_the_name_that_was_meant(one_line_error, here, command):
    assert one_line_error(*command, "tinny") == "model tinny does not exist; did you mean tiny?"


def test_convert_says_so_too(one_line_error, here):
    meant = "TokenPacker-13b-144token"
    assert one_line_error("convert", "TokenPacker13b-144token", "out").endswith(f"did you mean {meant}?")


@pytest.mark.parametrize("command", [("speed",), ("speed", "--plan"), ("count", "--size", "3x4")], ids=" ".join)
def test_carried_names_are_known_to_the_planner_and_the_counter_as_to_the_rest(run, here, command):
    quick = ("--rounds", 1, "--batch-sizes", 1, "--output-tokens", 2) if command == ("speed",) else ()
    assert run(*command, "--model", "tiny", *quick).exit_code == 0


def test_a_released_checkpoint_is_to_be_converted_first_and_no_network_is_needed_to_say_so(one_line_error, here):
    for name in ("TokenPacker-7b-144token", "sunshine-lwt/TokenPacker-7b-144token"):
        message = one_line_error("ask", "picture.png", "what?", "--model", name)
        assert message == f"model {name} is in the original layout; first run: tokenpacker convert {name} DST"


def test_models_names_those_that_are_carried(run, run_json):
    carried = run_json("models")["carried"]
    assert [model["name"] for model in carried] == carried_models()
    by_name = {model["name"]: model for model in carried}
    assert by_name["tiny-regions"]["regions"]
    assert not by_name["tiny"]["regions"]
    assert (by_name["tiny"]["projector"], by_name["tiny"]["scale_factor"]) == ("token-packer", 2)
    assert by_name["tiny-mlp"]["scale_factor"] is None
    shown = run("models").stdout
    assert all(name in shown for name in carried_models())
