"""A projector of another package: installed, it works by its name everywhere, and is imported only then."""

import subprocess
import sys
from importlib.util import find_spec
from zipfile import ZipFile

import pytest
import torch

from tokenpacker import VisionFeatures, projectors
from tokenpacker.projectors import base

DIST_INFO = {
    "METADATA": "Metadata-Version: 2.1\nName: row-mean-projector\nVersion: 1.0\n",
    "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "entry_points.txt": "[tokenpacker.projectors]\nrow-mean = row_mean_projector:RowMean\n",
}

MODULE = """
from dataclasses import dataclass

from torch import nn

from tokenpacker.projectors import Projector, ProjectorConfig, register


@dataclass(frozen=True, kw_only=True)
class RowMeanConfig(ProjectorConfig):
    name = "row-mean"

    def token_grid(self, patch_grid, scale_factor=None):
        return patch_grid[0], 1


@register(RowMeanConfig)
class RowMean(Projector):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.proj = nn.Linear(config.vision_dim, config.language_dim)
        self.init_weights()

    def forward(self, features, scale_factor=None):
        return self.proj(features.query.unflatten(1, features.patch_grid).mean(dim=2))
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs the package as a user would, without the network, into a folder that Python finds for this test."""
    if find_spec("pip") is None:
        pytest.skip("installing a package needs pip")
    wheel, target = tmp_path / "row_mean_projector-1.0-py3-none-any.whl", tmp_path / "site-packages"
    members = {f"row_mean_projector-1.0.dist-info/{name}": text for name, text in DIST_INFO.items()}
    members["row_mean_projector.py"] = MODULE
    with ZipFile(wheel, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
        record = "row_mean_projector-1.0.dist-info/RECORD"
        archive.writestr(record, "".join(f"{name},,\n" for name in [*members, record]))
    options = ["--no-deps", "--no-index", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    monkeypatch.syspath_prepend(target)
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    yield
    sys.modules.pop("row_mean_projector", None)


def test_an_installed_package_brings_its_projector(installed, tmp_path):
    assert "row-mean" in projectors.available()
    assert "row_mean_projector" not in sys.modules
    projector = projectors.build({"name": "row-mean", "vision_dim": 8, "language_dim": 4})
    assert type(projector).__module__ == "row_mean_projector"
    query = torch.randn(2, 24, 8)
    features = VisionFeatures(query, query, (4, 6))
    assert projector(features).shape == (2, projector.config.num_tokens((4, 6)), 4)
    projectors.save(projector.config, projector.state_dict(), tmp_path / "row-mean.safetensors")
    assert torch.equal(projectors.load(tmp_path / "row-mean.safetensors")(features), projector(features))
