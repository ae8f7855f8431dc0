"""Measures every option of TokenPackerPlus alone, beside TokenPacker and the MLP, as `tokenpacker compare` does.

    python -m benchmarks.options --output runs/compare

goes on from the rows of a comparison that lie there. All options of `tokenpacker compare` may follow.
"""

from __future__ import annotations

import sys

from benchmarks.token_packer_plus import TokenPackerPlus, TokenPackerPlusConfig
from tokenpacker.cli.app import app
from tokenpacker.projectors import register

OPTIONS = ("dense_query=true", "window_position=true", "window_margin=1", "global_token=true", "query_level=0")
PROJECTORS = ("token-packer", "mlp", *(f"{TokenPackerPlusConfig.name}:{option}" for option in OPTIONS))
SCALE_FACTOR = 4

register(TokenPackerPlusConfig)(TokenPackerPlus)  # here, so that the processes of a comparison do it, too

if __name__ == "__main__":
    asked = ["compare", "--projectors", ",".join(PROJECTORS), "--scale-factors", str(SCALE_FACTOR)]
    app([*asked, *sys.argv[1:]], prog_name="python -m benchmarks.options")
