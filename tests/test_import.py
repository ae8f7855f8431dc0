"""The core needs torch and nothing else."""

import subprocess
import sys

BLOCKED_IMPORT = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "PIL", "typer", "rich"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
import torch
from tokenpacker import RegionConfig, RegionEncoder, TokenPacker, TokenPackerProjectorConfig, VisionFeatures

packer = TokenPacker(TokenPackerProjectorConfig(vision_dim=8, language_dim=16, num_levels=2, num_heads=2))
features = VisionFeatures(torch.randn(1, 16, 8), torch.randn(1, 16, 16), (4, 4))
encoder = RegionEncoder(RegionConfig(vision_dim=8, language_dim=16, num_levels=2))
regions = encoder(features, torch.ones(3, 1, 16), torch.zeros(3, dtype=torch.int64))
print(tuple(packer(features).shape), tuple(regions.shape))
"""


def test_the_core_works_with_transformers_and_pillow_blocked():
    done = subprocess.run([sys.executable, "-c", BLOCKED_IMPORT], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "(1, 4, 16) (3, 16)", done.stderr


def test_importing_the_package_loads_neither_transformers_nor_pillow():
    check = "import sys, tokenpacker; print(sorted({'transformers', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
