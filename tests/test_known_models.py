"""Names that stand for models: one way to find a model for all commands."""

from __future__ import annotations

import pytest

from tokenpacker.known_models import carried_model_path, is_released, resolve
from tokenpacker.text import did_you_mean


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


def test_nothing_is_meant_where_nothing_is_close():
    assert did_you_mean("xyzzy", ["tiny", "small"]) == ""
