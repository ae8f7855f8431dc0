"""Whole runs as values: recipes, files, single settings, and what is refused."""

from __future__ import annotations

import json
import re

import pytest

from tokenpacker.carried.recipes import find_recipe, recipes
from tokenpacker.train.config import changed, from_dict, merged, read_config
from tokenpacker.train.paper_recipes import (
    align,
    elastic,
    in_high_resolution,
    instruct,
    region,
    region_instruct,
    with_qlora,
)


def test_the_paper_trains_the_projector_first_and_the_language_model_with_it_then():
    first, second = align(), instruct()
    assert (first.train, first.optimizer.learning_rate, first.batch_size) == (("projector",), 1e-3, 256)
    assert (second.train, second.optimizer.learning_rate, second.batch_size) == (
        ("projector", "language_model"),
        2e-5,
        128,
    )
    for stage in (first, second):
        assert (stage.epochs, stage.optimizer.weight_decay, stage.optimizer.warmup_share) == (1, 0, 0.03)
        assert (stage.precision, stage.data.max_length, stage.data.packed) == ("bfloat16", 2048, False)
    assert (first.model.chat_format, second.model.chat_format) == ("plain", "v1")


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_has_its_name_and_survives_a_file(name, tmp_path):
    config = find_recipe(name)
    assert config.name == name
    (tmp_path / "config.json").write_text(config.to_json())
    assert from_dict(json.loads((tmp_path / "config.json").read_text())) == config


def test_variants_change_what_they_say_and_nothing_else():
    base = instruct("13b")
    hd = in_high_resolution(base, 16)
    assert (hd.model.image_mode, hd.model.max_tiles, hd.data.max_length) == ("slice", 16, 4096)
    assert hd.optimizer == base.optimizer
    assert in_high_resolution(base, 9).data.max_length == 4096
    assert elastic(base).scale_factors == (2, 3, 4)
    qlora = with_qlora(base)
    assert qlora.lora is not None
    assert qlora.lora.four_bit
    assert qlora.train == ("projector",)
    assert qlora.optimizer.part_learning_rates == {"projector": 2e-5}
    with pytest.raises(ValueError, match="max_tiles=12 is none of the paper's"):
        in_high_resolution(base, 12)


def test_the_region_stages_are_those_of_the_originals_scripts():
    first, second = region(), region_instruct()
    assert (first.name, first.train, first.optimizer.learning_rate) == ("region-7b-hd9", ("regions",), 5e-4)
    assert second.train == ("projector", "regions", "language_model")
    assert second.optimizer.learning_rate == 2e-5
    for stage in (first, second):
        assert (stage.batch_size, stage.epochs, stage.optimizer.warmup_share) == (128, 1, 0.03)
        assert (stage.model.image_mode, stage.model.max_tiles, stage.model.chat_format) == ("slice", 9, "v1")
    assert first.model.start == f"runs/{in_high_resolution(instruct()).name}/model"
    assert second.model.start == f"runs/{first.name}/model"
    assert find_recipe("region-instruct-13b-hd9-lora").optimizer.part_learning_rates == {
        "projector": 2e-5,
        "regions": 2e-5,
    }


@pytest.mark.parametrize("name", recipes())
def test_tiles_never_make_a_recipes_steps_smaller_than_it_says(name):
    config = find_recipe(name)
    tiles = (config.model.max_tiles or 0) + 1
    assert config.device_batch_size * tiles <= config.data.max_tiles_per_batch


def test_settings_are_dotted_keys_with_yaml_values():
    config = changed(
        instruct(), ["optimizer.learning_rate=1e-4", "train=[projector]", "lora.rank=8", "data.path=x.json", "seed=7"]
    )
    assert (config.optimizer.learning_rate, config.train, config.seed) == (1e-4, ("projector",), 7)
    assert config.lora is not None
    assert (config.lora.rank, config.lora.alpha) == (8, 256)
    assert changed(config, ["lora=null", "train=[language_model]"]).lora is None


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_file_changes_what_it_names(tmp_path, suffix):
    path = tmp_path / f"mine{suffix}"
    path.write_text('{"optimizer": {"learning_rate": 3e-5}, "model": {"projector": {"name": "mlp"}}}')
    config = merged(instruct(), read_config(path))
    assert config.optimizer.learning_rate == 3e-5
    assert config.optimizer.warmup_share == 0.03
    assert config.model.projector == {"name": "mlp"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.scenes.foo=1", "data.scenes.foo is no setting; use one of captions"),
        ("optimizer.learnig_rate=1", "optimizer.learnig_rate is no setting; did you mean optimizer.learning_rate?"),
        ("optimzer.learning_rate=1", "optimzer is no setting; did you mean optimizer?"),
        ("batch_size=many", "batch_size='many' must be a valid integer"),
        ("batch_size=true", "batch_size=True must be a valid integer"),
        ("model.image_mode=round", "model.image_mode='round' must be 'slice', 'pad' or 'square'"),
        ("precision=float64", "precision='float64' must be 'float32' or 'bfloat16'"),
        ("batch_size=100", "device_batch_size=16 does not divide batch_size=100"),
        ("train=[]", "train is empty"),
        ("mixed_share=0.5", "mixed_share=0.5 needs two scale_factors or more, and compile=false"),
        ("train=[head]", "train.0='head' must be 'vision_tower', 'projector', 'regions' or 'language_model'"),
        ("lora.rank=4", "lora replaces the training of language_model"),
        ("epochs=0", "epochs=0 must be greater than 0"),
        ("data.max_reject_share=2", "data.max_reject_share=2 must be less than or equal to 1"),
        ("save_every=0", "save_every=0 must be greater than 0"),
        ("seed", "has no '='"),
        ("data.path=[", "is no value"),
        ("seed.x=3", "seed={'x': 3} must be a valid integer"),
    ],
)
def test_what_cannot_be_is_refused_with_its_key(setting, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        changed(instruct(), [setting])


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", "\xff\xfe"])
def test_a_file_without_settings_is_refused(tmp_path, content):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"mine\.yaml"):
        read_config(path)
    with pytest.raises(ValueError, match="does not exist"):
        read_config(tmp_path / "nowhere.yaml")


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean instruct-7b-hd9"):
        find_recipe("instruct-7b-hd8")


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ("optimizer.learning_rate=-1", "optimizer.learning_rate=-1 must be greater than 0"),
        ("optimizer.betas=[0.9]", "optimizer.betas.1 is missing; give it a value"),
        (
            "optimizer.part_learning_rates={projector: fast}",
            "projector='fast' must be a valid number",
        ),
        ("data.max_length=0", "data.max_length=0 must be greater than 0"),
        ("epochs=.nan", "epochs=nan must be a finite number"),
        ("data=3", "data=3 must be an object"),
        ("lora={rank: 0}", "lora.rank=0"),
    ],
)
def test_values_without_sense_are_refused_by_name(setting, rule):
    with pytest.raises(ValueError, match=rule):
        changed(align(), [setting])
