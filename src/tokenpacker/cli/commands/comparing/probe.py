"""`tokenpacker probe`: projectors on frozen features alone, in minutes."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

from tokenpacker.cli import options
from tokenpacker.cli.arguments import names, require_projectors, whole_numbers
from tokenpacker.cli.errors import UNFINISHED, keeping, sigterm_as_ctrl_c
from tokenpacker.cli.options import flag, number, value
from tokenpacker.cli.output import print_result

QUICK_STEPS, QUICK_SEEDS = "20", "0"


def probe(
    output: Annotated[Path | None, value("FOLDER", "Where everything goes.", "probe, or probe-quick")] = None,
    projectors: Annotated[str, value("NAME,...", "With settings: resampler:num_heads=2.", "all")] = "",
    tokens: Annotated[str, value("T,...", "Packed tokens of the 576 of a picture.")] = "36",
    steps: Annotated[str | None, value("N,...", "Steps of training.", "400")] = None,
    seeds: Annotated[str | None, value("N,...", "Seeds of weights and picture order.", "0,1,2")] = None,
    pictures: Annotated[
        Literal["test", "dev"], value("SPLIT", "Who is asked: test, or dev to choose settings.")
    ] = "test",
    questions: Annotated[str, value("NAME", "letters, or photos of things.")] = "letters",
    stamps: Annotated[
        Path | None, value("FOLDER", "Tux Paint's, for photos.", "the installed", exists=True, file_okay=False)
    ] = None,
    encoder: Annotated[str, value("NAME", "craft, or own-vit with --weights.")] = "craft",
    weights: Annotated[
        Path | None, value("FILE", "Weights of the encoder.", "the package's", exists=True, dir_okay=False)
    ] = None,
    jobs: Annotated[int | None, number("Runs side by side.", "one a core")] = None,
    quick: Annotated[bool, flag("--quick", "Only see that everything runs; two minutes.")] = False,
    as_json: options.Json = False,
) -> None:
    """Test projectors on their own: what can be read from packed tokens?

    A frozen encoder sees pictures, a projector packs its features, and a reader learns to answer questions of them.
    The same command goes on after Ctrl-C. Exit code 0: all is finished. 75: a signal stopped it. 2: it cannot run.

    Examples:
        tokenpacker probe --projectors token-packer,pixel-shuffle
        tokenpacker probe --tokens 144,64,36,16,9,4 --steps 400,1200 --output runs/probe
    """
    output = output or Path("probe-quick" if quick else "probe")
    chosen = names(projectors)
    numbers = {
        "tokens": whole_numbers("--tokens", tokens),
        "steps": whole_numbers("--steps", steps or (QUICK_STEPS if quick else "400")),
        "seeds": whole_numbers("--seeds", seeds or (QUICK_SEEDS if quick else "0,1,2"), least=0),
    }
    require_projectors(chosen)
    from tokenpacker.compare.probe import probe_report, probing
    from tokenpacker.compare.probe.probe_plan import Probe

    kept = f"what is finished stands in {output}: call it again and it goes on"
    with keeping(kept, UNFINISHED), sigterm_as_ctrl_c():
        parts = {"questions": questions, "stamps": stamps, "encoder": encoder, "weights": weights}
        asked = Probe(**parts, projectors=chosen, split=pictures, quick=quick, **numbers)  # type: ignore[arg-type]
        probing.probe(asked, output, jobs=jobs, command=shlex.join(["tokenpacker", *sys.argv[1:]]))
    result = json.loads((output / probe_report.JSON_FILE).read_text(encoding="utf-8"))
    print_result(as_json, result, (output / probe_report.TABLE_FILE).read_text(encoding="utf-8").removesuffix("\n"))
