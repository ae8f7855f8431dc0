"""Everything that only a GPU can tell, in one command; see docs/gpu.md."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "src"))  # the checkout need not be installed
