from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stand_in_stamps import make_stamps
from tokenpacker.compare.probe import encoders, own_vit
from tokenpacker.compare.probe.contract import find_encoder
from tokenpacker.compare.probe.own_vit import OwnViT, pretrain
from tokenpacker.compare.probe.photo_scenes import Photos
from tokenpacker.compare.probe.reading import read
from tokenpacker.projectors import AveragePoolConfig

STEPS = 3


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Photos:
    return Photos(make_stamps(tmp_path_factory.mktemp("stamps")))


@pytest.fixture(scope="module")
def weights(photos, tmp_path_factory):
    return pretrain([photos], tmp_path_factory.mktemp("trained"), steps=STEPS)


def test_a_training_that_was_killed_goes_on_to_the_same_weights(photos, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(own_vit, "SAVE_EVERY", 1)
    whole_step = own_vit._step

    def killed(model, optimizer, questions, step, steps):
        if step == STEPS - 1:
            raise KeyboardInterrupt
        return whole_step(model, optimizer, questions, step, steps)

    monkeypatch.setattr(own_vit, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        pretrain([photos], tmp_path, steps=STEPS)
    steps_after = []
    monkeypatch.setattr(own_vit, "_step", lambda *given: steps_after.append(given[3]) or whole_step(*given))
    again = pretrain([photos], tmp_path, steps=STEPS)
    assert steps_after == [STEPS - 1]
    assert (again.name, again.read_bytes()) == (weights.name, weights.read_bytes())
    assert list(tmp_path.iterdir()) == [again]


def test_a_finished_training_is_found_again(photos, weights, monkeypatch):
    monkeypatch.setattr(own_vit, "_step", lambda *given: pytest.fail("it is trained already"))
    assert pretrain([photos], weights.parent, steps=STEPS) == weights


def test_training_changes_the_weights(weights, photos, tmp_path):
    other = OwnViT(pretrain([photos], tmp_path, steps=STEPS - 1))
    assert other.digest != OwnViT(weights).digest
    assert other.weights.name != weights.name


def test_each_patch_has_its_place_in_every_level(weights, photos):
    scene, _ = photos.draw("test", 0)
    changed = np.asarray(scene).copy()
    row, col = 5, 17
    changed[8 * row : 8 * row + 8, 8 * col : 8 * col + 8] = np.random.default_rng(0).integers(0, 256, (8, 8, 3))
    encoder = find_encoder("own-vit", weights)
    before, after = encoder.levels([scene]), encoder.levels([Image.fromarray(changed)])
    assert len(before) == encoder.num_levels
    for one, other in zip(before, after, strict=True):
        assert one.shape == (1, 24 * 24, 128)
        assert (one - other).norm(dim=-1).argmax() == 24 * row + col


def test_the_command_prints_the_file_that_the_encoder_takes(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(own_vit, "find_questions", lambda name, folder=None: photos)
    own_vit.main([str(tmp_path), "--stamps", str(photos.folder), "--steps", "1"])
    assert OwnViT(Path(capsys.readouterr().out.strip())).digest


def test_levels_differ(weights, photos):
    levels = OwnViT(weights).levels([photos.draw("test", 0)[0]])
    assert not any(torch.equal(levels[one], levels[one - 1]) for one in range(1, len(levels)))


def test_without_weights_the_remedy_is_named(tmp_path):
    for weights in (None, tmp_path / "none.safetensors"):
        with pytest.raises(ValueError, match="own-vit needs"):
            find_encoder("own-vit", weights)


def test_photos_are_read_through_it(weights, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(encoders, "WHITENING_PICTURES", 8)
    encoded = encoders.encode(photos, OwnViT(weights), {"train": 8, "dev": 4}, tmp_path)
    config = AveragePoolConfig(vision_dim=96, language_dim=128, num_levels=4, scale_factor=4)
    result = read(config, photos.num_classes, encoded["train"], encoded["dev"], steps=2, seed=0)
    assert 0 <= result["accuracy"] <= 1
    assert np.isfinite(result["loss"])
