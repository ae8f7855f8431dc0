from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import ClassVar

import pytest
import torch

from tokenpacker import projectors
from tokenpacker.projectors import Projector, ProjectorConfig, base


@pytest.fixture
def registry(monkeypatch):
    """The registry as it is, restored after the test."""
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))


@dataclass(frozen=True, kw_only=True)
class FirstTokenConfig(ProjectorConfig):
    name: ClassVar[str] = "first-token"

    def token_grid(self, patch_grid, scale_factor=None):
        return 1, 1


class FirstToken(Projector):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.proj = torch.nn.Linear(config.vision_dim, config.language_dim)

    def forward(self, features, scale_factor=None):
        return self.proj(features.query[:, :1])


def test_a_projector_of_ones_own_is_built_by_name(registry):
    projectors.register(FirstTokenConfig)(FirstToken)
    built = projectors.build({"name": "first-token", "vision_dim": 8, "language_dim": 4})
    assert isinstance(built, FirstToken)
    assert "first-token" in projectors.available()


def test_another_package_adds_one_by_an_entry_point(registry, monkeypatch):
    point = EntryPoint("first-token", "unused:unused", base.ENTRY_POINT_GROUP)
    monkeypatch.setattr(EntryPoint, "load", lambda self: projectors.register(FirstTokenConfig)(FirstToken))
    monkeypatch.setattr(base, "entry_points", lambda group: [point])
    assert "first-token" in projectors.available()
    assert isinstance(projectors.build({"name": "first-token", "vision_dim": 8, "language_dim": 4}), FirstToken)


def test_a_name_that_is_taken_is_refused(registry):
    class Impostor(FirstToken):
        pass

    projectors.register(FirstTokenConfig)(FirstToken)
    with pytest.raises(ValueError, match="'first-token' is taken by FirstToken"):
        projectors.register(FirstTokenConfig)(Impostor)


def test_an_unknown_name_lists_the_valid_ones():
    with pytest.raises(ValueError, match=r"unknown projector 'tokenpacker'; available: .*mlp.*token-packer"):
        projectors.build({"name": "tokenpacker"})


def test_an_unknown_key_lists_the_valid_ones():
    with pytest.raises(ValueError, match=r"unknown keys \['scale'\] for projector 'token-packer'.*scale_factor"):
        projectors.config_from_dict({"name": "token-packer", "vision_dim": 8, "language_dim": 4, "scale": 2})


def test_a_missing_key_is_named():
    with pytest.raises(ValueError, match=r"needs the keys \['language_dim'\]"):
        projectors.config_from_dict({"name": "mlp", "vision_dim": 8})


def test_the_mlp_keeps_every_token_and_refuses_to_pack():
    config = projectors.MlpConfig(vision_dim=8, language_dim=4)
    assert config.num_tokens((24, 24)) == 576
    with pytest.raises(ValueError, match="scale_factor=2 but the mlp projector keeps every token"):
        config.num_tokens((24, 24), 2)
