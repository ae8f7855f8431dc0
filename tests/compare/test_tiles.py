import pytest
import torch

from tokenpacker.compare.tiles import HD, ONE_TILE, drawn_tasks, encode_test_tiles, modes
from tokenpacker.evaluate import evaluate
from tokenpacker.train.assemble import assemble


@pytest.fixture(scope="module")
def asked(comparison_of):
    """A model with its processor, not trained."""
    comparison = comparison_of(projectors=("token-packer",))
    model, processor = assemble(comparison.stages(comparison.runs()[0])[0])
    return model.eval(), processor


def test_features_are_those_of_the_encoder(asked, tmp_path):
    model, processor = asked
    tiles = encode_test_tiles(tmp_path, model, processor, 6, "encoder")
    sample = drawn_tasks(6)[1].load()[0]
    pixels = processor.image_processor([sample.image], return_tensors="pt")["pixel_values"]
    assert pixels.shape[0] > 1
    with torch.inference_mode():
        kept, fresh = tiles.features(model.model, pixels), model.model.vision_features(pixels)
    # Equal but for the rounding of products that other tiles stand beside.
    torch.testing.assert_close(kept.query, fresh.query, rtol=0, atol=1e-5)
    torch.testing.assert_close(kept.levels, fresh.levels, rtol=0, atol=1e-5)


def test_tiles_that_are_unknown_go_through_the_encoder(asked, tmp_path):
    model, processor = asked
    tiles = encode_test_tiles(tmp_path, model, processor, 6, "encoder")
    noise = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(tiles.features(model.model, noise).query, model.model.vision_features(noise).query)


def test_answers_are_the_same_and_the_encoder_is_not_called(comparison_of, asked, tmp_path, monkeypatch):
    _, processor = asked
    comparison = comparison_of(projectors=("token-packer",))
    model, _ = assemble(comparison.stages(comparison.runs()[0])[0])
    task = drawn_tasks(6)[1]
    expected = evaluate(model, processor, task, progress=False)
    encode_test_tiles(tmp_path, model.eval(), processor, 6, "encoder").serve(model)
    monkeypatch.setattr(model.model.vision_tower, "forward", None)
    found = evaluate(model, processor, task, progress=False)
    assert (found.score, found.errors) == (expected.score, expected.errors)


def test_features_are_kept_until_encoder_or_questions_are_others(asked, tmp_path, monkeypatch):
    model, processor = asked
    encode_test_tiles(tmp_path, model, processor, 6, "encoder")
    encoded = []
    encode = type(model.model).vision_features
    monkeypatch.setattr(type(model.model), "vision_features", lambda *given: encoded.append(1) or encode(*given))
    encode_test_tiles(tmp_path, model, processor, 6, "encoder")
    assert not encoded
    few = encode_test_tiles(tmp_path, model, processor, 6, "another")
    assert encoded
    many = encode_test_tiles(tmp_path, model, processor, 20, "another")
    assert len(many.places) > len(few.places)


def test_pictures_of_one_tile_have_one_mode(asked):
    _, processor = asked
    easy, fine = drawn_tasks(6)
    assert modes(processor, fine) == {ONE_TILE: 1, HD: 9}
    small = processor.image_processor.tile_size[0] >= 64
    assert set(modes(processor, easy)) == ({ONE_TILE} if small else {ONE_TILE, HD})
