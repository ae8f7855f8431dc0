"""One way to find a model for all commands: names that stand for models, and a hub that may not be reached."""

from __future__ import annotations

import socket
import time

import huggingface_hub.utils  # noqa: F401 - takes its time when it is imported first
import pytest

from tokenpacker import hub
from tokenpacker.hub import carried_model_path, is_released, resolve

REMEDY = "give a folder"


@pytest.fixture
def online(monkeypatch):
    """As if the machine had a network; whatever was found out before is forgotten."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    forget = hub.hub_problem.cache_clear
    forget()
    yield monkeypatch
    forget()


def error_of(name):
    with pytest.raises(ValueError, match=r"^model ") as caught:
        hub.fetch(name, ["config.json"], REMEDY)
    return str(caught.value)


def test_a_hub_that_never_answers_costs_less_than_two_seconds_and_only_once(online):
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes the connection, and says nothing
        online.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        start = time.perf_counter()
        message = error_of("a/b")
        assert time.perf_counter() - start < hub.SECONDS + 1  # the machine may be busy
        assert message.startswith("model a/b is no folder here, and the hub cannot be reached for it (")
        assert message.endswith("check the name and the network, or give a folder")
        assert "\n" not in message
        start = time.perf_counter()
        error_of("c/d")
        assert time.perf_counter() - start < 1


def test_a_hub_that_refuses_is_told_at_once(online):
    online.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "refused" in error_of("a/b")


def test_what_was_fetched_before_serves_without_the_hub(online, tmp_path):
    online.setattr(hub, "hub_problem", lambda: "no network")
    asked = {}

    def download(name, **options):
        asked.update(options)
        return str(tmp_path)

    online.setattr("huggingface_hub.snapshot_download", download)
    assert hub.fetch("a/b", ["config.json"], REMEDY) == tmp_path
    assert asked["local_files_only"]


def test_a_name_that_can_be_no_repository_is_refused_without_the_hub(online, tmp_path):
    online.setattr(hub, "hub_problem", lambda: pytest.fail("the hub was asked"))
    (tmp_path / "file").touch()
    assert error_of(str(tmp_path / "file")) == f"model {tmp_path / 'file'} is a file; {REMEDY}"
    assert error_of("./a/b") == f"model ./a/b does not exist; {REMEDY}"
    assert hub.fetch(str(tmp_path), [], REMEDY) == tmp_path


def test_a_carried_model_goes_by_its_name_unless_a_folder_has_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve("tiny") == str(carried_model_path("tiny"))
    (tmp_path / "tiny").mkdir()
    assert resolve("tiny") == "tiny"


def test_a_released_checkpoint_goes_by_its_name_without_the_owner():
    assert resolve("TokenPacker-HD-7b-9patch-144token") == "sunshine-lwt/TokenPacker-HD-7b-9patch-144token"
    assert is_released("TokenPacker-7b-144token")
    assert is_released("sunshine-lwt/TokenPacker-7b-144token")
    assert not is_released("tiny")


@pytest.mark.parametrize(
    ("name", "meant"),
    [("tinny", "tiny"), ("tiny_regions", "tiny-regions"), ("TokenPacker-7b-144tokens", "TokenPacker-7b-144token")],
)
def test_a_slip_is_told_with_the_name_that_was_meant(name, meant):
    with pytest.raises(ValueError, match=f"^model {name} does not exist; did you mean {meant}\\?$"):
        resolve(name)


@pytest.mark.parametrize("name", ["gpt2", "bert-base-uncased", "lmsys/vicuna-7b-v1.5", "somebody/tinny", "a/b/c"])
def test_any_other_name_stays_as_it_is(name):
    assert resolve(name) == name
