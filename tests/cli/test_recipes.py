"""`tokenpacker train RECIPE`: shown before it runs, run, and gone on with."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def data(tmp_path, image_of):
    """Six rows in LLaVA's form: an image each, but for the last."""
    rows = []
    for number in range(6):
        image_of(30, 40, seed=number).save(tmp_path / f"{number}.png")
        talk = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "yes"}]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": talk})
    rows.append({"id": "text", "conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so"}]})
    path = tmp_path / "data.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def small(tiny_model_dir):
    """Options that make a recipe of the paper fit a tiny model on a CPU."""
    settings = [
        "precision=float32",
        "batch_size=2",
        "device_batch_size=1",
        "data.num_workers=0",
        "report_to=[]",
        "data.max_length=512",
        "checkpointing=false",
    ]
    return ["--start", tiny_model_dir, *(word for setting in settings for word in ("--set", setting))]


def test_a_dry_run_shows_parameters_tokens_and_steps(run, run_json, data, small):
    shown = run_json("train", "align-7b", "--data", data, *small, "--set", "model.chat_format=v1", "--dry-run")
    assert shown["parameters"]["projector"]["frozen"] == 0
    assert shown["parameters"]["language_model"]["trainable"] == 0
    assert (shown["samples"]["used"], shown["samples"]["with_images"], shown["steps"]) == (7, 6, 4)
    assert shown["config"]["optimizer"]["learning_rate"] == 1e-3
    text = run("train", "align-7b", "--data", data, *small, "--set", "model.chat_format=v1", "--dry-run").stdout
    assert "4 steps" in text
    assert "learning_rate: 0.001" in text


def test_a_recipe_may_start_from_a_carried_model(run_json):
    pytest.importorskip("easy_vqa", reason="the easy-vqa package is not installed")
    shown = run_json("train", "region-tiny", "--dry-run")
    assert shown["parameters"]["regions"]["trainable"] > 0
    assert shown["parameters"]["language_model"]["trainable"] == shown["parameters"]["projector"]["trainable"] == 0
    assert shown["config"]["data"]["scenes"]["regions"] == 1.0


@pytest.mark.slow
def test_a_recipe_trains_and_its_model_answers(run_json, data, small, tmp_path, picture):
    command = ("train", "instruct-7b", "--data", data, *small, "--output", tmp_path / "run")
    folder = run_json(*command)["model"]
    assert folder == str(tmp_path / "run" / "model")
    assert run_json("ask", picture, "what?", "--model", folder, "--max-new-tokens", "2")["image_tokens"] > 0
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "| samples used | 7 of 7 |" in card
    assert (tmp_path / "run" / "model" / "loss.png").is_file()
    assert (tmp_path / "run" / "projector.safetensors").is_file()


def test_mistakes_are_told_in_one_line(one_line_error, data, small, tmp_path):
    assert "did you mean align-7b" in one_line_error("train", "algin-7b")
    assert "data.path is missing; give the data file, shards or a hub id with --data" in one_line_error(
        "train", "align-7b", *small, "--output", tmp_path / "run"
    )
    assert "did you mean data.num_workers" in one_line_error("train", "align-7b", "--set", "data.num_worker=1")


def test_ctrl_c_outside_of_the_steps_says_what_is_kept(run, data, small, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tokenpacker.train.run.train", interrupted)
    result = run("train", "align-7b", "--data", data, *small, "--output", tmp_path / "run")
    assert result.exit_code == 75
    assert result.stdout == ""
    assert (
        result.stderr
        == f"stopped; {tmp_path / 'run'} keeps what is done so far, and the same command goes on from there\n"
    )


def test_the_engines_files_are_accelerates_own(run_json):
    from accelerate.commands.config.config_args import load_config_from_file

    files = run_json("train", "engines")
    assert set(files) == {"ddp", "fsdp2", "zero2", "zero3"}
    kinds = {name: str(load_config_from_file(path).distributed_type) for name, path in files.items()}
    assert "FSDP" in kinds["fsdp2"]
    assert "DEEPSPEED" in kinds["zero3"]


def test_every_recipe_is_listed(run, run_json):
    from tokenpacker.carried.recipes import recipes

    head, *lines = run("train", "recipes").stdout.splitlines()
    assert head.split() == ["recipe", "learns", "rate", "step", "images"]
    assert [line.split()[0] for line in lines] == list(recipes())
    assert run_json("train", "recipes")["instruct-7b"]["optimizer"]["learning_rate"] == 2e-5
