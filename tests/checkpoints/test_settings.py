"""Every key of a released config.json is honoured."""

from __future__ import annotations

import pytest

from tokenpacker.checkpoints import convert, load_released


def test_a_slicing_model_gets_the_released_rules(make_complete):
    _, processor = load_released(make_complete())
    images = processor.image_processor
    assert (images.image_mode, images.max_tiles, images.grid_list) == ("slice", 9, "released")
    assert (images.thumbnail_source, images.antialias) == ("canvas", False)
    assert (processor.row_separator, processor.row_separator_id) == ("unknown", 0)
    assert images.tile_size == [16, 16]


@pytest.mark.parametrize("limit", [9, 16, 25, "16"])
def test_patch_num_is_the_limit_of_tiles(make_complete, limit):
    _, processor = load_released(make_complete(config={"patch_num": limit}))
    assert processor.image_processor.max_tiles == int(limit)


@pytest.mark.parametrize(
    ("ratio", "mode"), [("pad", "pad"), ("slice", "slice"), ("square", "square"), (None, "square")]
)
def test_image_aspect_ratio_is_the_image_mode(make_complete, ratio, mode):
    _, processor = load_released(make_complete(config={"image_aspect_ratio": ratio}))
    assert processor.image_processor.image_mode == mode


@pytest.mark.parametrize(("scale_factor", "tokens"), [(None, 4), (2, 4), (4, 1)])
def test_scale_factor_counts_the_tokens_of_a_tile(make_complete, scale_factor, tokens):
    model, processor = load_released(make_complete(config={"scale_factor": scale_factor}))
    assert model.config.projector.num_tokens((4, 4)) == tokens
    assert processor.image_layout((16, 16)).num_tokens == tokens + 1


def test_the_first_versions_name_of_the_scale_factor_is_known(make_complete):
    model, _ = load_released(make_complete(config={"scale_factor": None, "down_rate": 4}))
    assert model.config.projector_config["scale_factor"] == 4


def test_what_differs_from_the_published_model_is_told(make_complete, tmp_path, monkeypatch):
    hub_id = "sunshine-lwt/TokenPacker-HD-13b-16patch-64token"
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(make_complete()))
    tiles, scale = convert(hub_id, tmp_path / "converted")["notes"]
    assert "published with 16: give --max-tiles 16" in tiles
    assert "published with 3: give --scale-factor 3" in scale


@pytest.mark.parametrize(("layer", "level"), [(-2, 23), (None, 23), (-1, 24), (22, 22)])
def test_the_select_layer_is_the_level_of_the_query(make_complete, layer, level):
    model, _ = load_released(make_complete(config={"mm_vision_select_layer": layer}))
    assert model.config.vision_query_level == level
    assert model.config.vision_levels == [12, 16, 22, 23]  # fixed in the original


def test_the_context_length_reaches_the_tokenizer(make_complete):
    assert load_released(make_complete())[1].tokenizer.model_max_length == 256
    assert load_released(make_complete(config={"max_sequence_length": 400}))[1].tokenizer.model_max_length == 400


def test_the_pixels_are_normalised_as_the_tower_says(make_complete, tower_folder):
    (tower_folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.4, 0.3], "image_std": [1, 2, 3]}')
    try:
        _, processor = load_released(make_complete())
    finally:
        (tower_folder / "preprocessor_config.json").unlink()
    assert processor.image_processor.image_mean == [0.5, 0.4, 0.3]
    assert processor.image_processor.image_std == [1, 2, 3]


def test_generation_stops_and_pads_as_the_checkpoint_says_and_does_not_sample(make_complete):
    folder = make_complete()
    (folder / "generation_config.json").write_text('{"eos_token_id": 5, "temperature": 0.9, "top_p": 0.6}')
    model, _ = load_released(folder)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (5, 0)
    assert not model.generation_config.do_sample
    assert model.generation_config.temperature is None


def test_unknown_keys_are_told(make_complete, tmp_path):
    done = convert(make_complete(config={"mm_novelty": 3}), tmp_path / "converted")
    assert done["notes"] == ["config.json has keys that no released model is known to have: mm_novelty"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2'; a released TokenPacker model has 'llava'"),
        ({"model_type": "tokenpacker"}, "is a converted model already"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio='anyres'"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature='cls_patch'"),
        ({"patch_num": 12}, "patch_num=12; the original knows 9, 16, 25"),
        ({"scale_factor": 0}, "scale_factor=0; it must be a whole number of at least 1"),
        ({"scale_factor": 2.5}, "scale_factor=2.5"),
        ({"scale_factor": 5}, "scale_factor=5, which does not fit its tower's 4x4 patches"),
        ({"mm_vision_select_layer": 25}, "vision level 25 does not exist"),
        ({"mm_vision_select_layer": 0}, "vision level 0 does not exist"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_attention_heads": 5}, "is no config of a LLaMA"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "inv_freq are not those of its config"),
    ],
)
def test_a_config_that_cannot_be_is_refused(make_complete, config, message):
    with pytest.raises(ValueError, match=message):
        load_released(make_complete(config=config))


@pytest.mark.parametrize("content", ['{"pad_token_id": [0]}', '{"eos_token_id": "2"}', "{"])
def test_a_generation_config_that_cannot_be_is_refused(make_complete, content):
    folder = make_complete()
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match="generation_config"):
        load_released(folder)
