"""`--model` values that cannot work: one line that names the model and the remedy."""

from __future__ import annotations

import json
import shutil

import pytest

from tokenpacker.cli.loading import load_model
from tokenpacker.cli.model_files import find_model
from tokenpacker.hub import carried_model_path


@pytest.fixture
def error_of(one_line_error, picture):
    """The line that `ask` says to a model."""

    def ask(model: object) -> str:
        return one_line_error("ask", picture, "what?", "--model", model)

    return ask


@pytest.fixture
def model_copy(tiny_model_dir, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    return folder


def test_a_carried_model_is_found_by_its_name_unless_a_folder_has_it(tmp_path, monkeypatch, model_copy):
    assert find_model("tiny-mlp") == carried_model_path("tiny-mlp")
    assert find_model(None) == carried_model_path("tiny")
    monkeypatch.chdir(tmp_path)
    model_copy.rename(tmp_path / "tiny-mlp")
    assert find_model("tiny-mlp").resolve() == tmp_path / "tiny-mlp"


def test_a_whole_model_loads_ready_to_answer(model_copy):
    model, processor = load_model(str(model_copy))
    assert not model.training
    assert processor.image_token == "<image>"


def test_a_folder_that_is_not_there(error_of):
    assert error_of("./nowhere").startswith("model ./nowhere does not exist; give a folder that")


def test_a_file(error_of, picture):
    assert error_of(picture).startswith(f"model {picture} is a file; give a folder that")


def test_a_folder_without_config(error_of, tmp_path):
    assert error_of(tmp_path).startswith(f"model {tmp_path} has no config.json; give a folder that")


def test_a_folder_without_weights(error_of, model_copy):
    (model_copy / "model.safetensors").unlink()
    assert error_of(model_copy).startswith(f"model {model_copy} has no weights (model.safetensors or")


def test_a_folder_without_processor(error_of, model_copy):
    (model_copy / "processor_config.json").unlink()
    assert error_of(model_copy).startswith(f"model {model_copy} has no processor_config.json;")


def test_a_folder_without_tokenizer(error_of, model_copy):
    for path in model_copy.glob("tokenizer*"):
        path.unlink()
    assert error_of(model_copy).startswith(f"model {model_copy} cannot be loaded (")


@pytest.mark.parametrize("kind", ["bert", "llama", None])
def test_a_model_of_another_kind(error_of, model_copy, kind):
    (model_copy / "config.json").write_text(json.dumps({"model_type": kind}))
    assert error_of(model_copy).startswith(f"model {model_copy} is of the kind {kind!r}, not 'tokenpacker'; give")


def test_a_checkpoint_in_the_original_layout(error_of, model_copy):
    (model_copy / "config.json").write_text(json.dumps({"model_type": "llava"}))
    assert error_of(model_copy).endswith(f"is in the original layout; first run: tokenpacker convert {model_copy} DST")


@pytest.mark.parametrize("content", ["", "{", "[]", "\ufeff"])
def test_a_damaged_config(error_of, model_copy, content):
    (model_copy / "config.json").write_text(content)
    assert error_of(model_copy).startswith(f"{model_copy / 'config.json'} is damaged (")


def test_truncated_weights(error_of, model_copy):
    weights = model_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert error_of(model_copy).startswith(f"model {model_copy} cannot be loaded (")


def test_weights_that_do_not_cover_the_config(error_of, model_copy):
    from safetensors.torch import load_file, save_file

    weights = load_file(model_copy / "model.safetensors")
    gone = next(name for name in sorted(weights) if "projector" in name)
    del weights[gone]
    save_file(weights, model_copy / "model.safetensors", metadata={"format": "pt"})
    assert error_of(model_copy).startswith(f"model {model_copy} lacks 1 weights of its config, such as {gone};")


def test_weights_of_other_sizes(error_of, model_copy):
    config = json.loads((model_copy / "config.json").read_text())
    config["text_config"]["intermediate_size"] *= 2
    (model_copy / "config.json").write_text(json.dumps(config))
    message = error_of(model_copy)
    assert message.startswith(f"model {model_copy} ")
    assert "cannot be loaded" in message or "lacks" in message


def test_a_hub_name_without_a_network(error_of, monkeypatch):
    def offline(*_args: object, **_kwargs: object) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    message = error_of("somebody/some-model")
    assert message.startswith("model somebody/some-model is no folder here, and the hub cannot be reached for it")
    assert "; check the name and the network, or give a folder that" in message


def test_the_kind_of_a_hub_model_is_checked_before_its_weights_are_fetched(error_of, monkeypatch, tmp_path):
    fetched = []

    def download(_name: str, allow_patterns: list[str], **_: object) -> str:
        fetched.extend(allow_patterns)
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert "is of the kind 'llama'" in error_of("somebody/some-llama")
    assert fetched == ["config.json"]
