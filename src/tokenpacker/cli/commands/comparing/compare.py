"""`tokenpacker compare`: every projector under one recipe, accuracy and cost in one table."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

from tokenpacker.cli import options
from tokenpacker.cli.arguments import names, require_projectors, whole_numbers
from tokenpacker.cli.errors import UNFINISHED, keeping
from tokenpacker.cli.options import flag, number, value
from tokenpacker.cli.output import print_result

REAL = "Real recipes"  # panel of `--help`
DataFile = Annotated[str | None, value("FILE", "Training data of the stage.", panel=REAL)]
ImageFolder = Annotated[str | None, value("FOLDER", "Start of its image paths.", panel=REAL)]


def compare(
    output: Annotated[Path | None, value("FOLDER", "Where everything goes.", "compare, or compare-quick")] = None,
    projectors: Annotated[str, value("NAME,...", "With settings: resampler:num_heads=2.", "all")] = "",
    scale_factors: Annotated[str, value("S,...", "Each is a training of its own; mlp has none.")] = "2,4",
    seeds: Annotated[str | None, value("N,...", "Seeds of weights and data order.", "0,1,2")] = None,
    align_steps: Annotated[int | None, number("Steps of stage 1.", "400")] = None,
    instruct_steps: Annotated[int | None, number("Steps of stage 2.", "500")] = None,
    limit: options.Limit = None,
    foundation: Annotated[
        Path | None, value("FOLDER", "`state` of a `train tiny`, to start from.", "made", exists=True, file_okay=False)
    ] = None,
    jobs: Annotated[int | None, number("Runs side by side.", "one a core, or one a GPU")] = None,
    quick: Annotated[bool, flag("--quick", "Only see that everything runs; 15 minutes.")] = False,
    recipe: Annotated[str, value("STAGE1+STAGE2", "Both recipes.", panel=REAL)] = "align-tiny+instruct-tiny",
    data_align: DataFile = None,
    images_align: ImageFolder = None,
    data_instruct: DataFile = None,
    images_instruct: ImageFolder = None,
    as_json: options.Json = False,
) -> None:
    """Train every projector by one recipe, and compare them.

    Encoder, language model, data and steps are the same for all. The same command goes on after Ctrl-C.
    Exit code 0: all is finished. 75: a signal stopped it. 2: it cannot run.

    Examples:
        tokenpacker compare --quick --projectors token-packer,average-pool,mlp
        tokenpacker compare --recipe align-7b+instruct-7b --data-align A.json --data-instruct B.json
    """
    align, plus, instruct = recipe.partition("+")
    if not (align and plus and instruct):
        raise ValueError(f"--recipe {recipe} must be two names with a plus between, as in align-7b+instruct-7b")
    output = output or Path("compare-quick" if quick else "compare")
    settings: dict[str, Any] = {
        "recipe": (align, instruct),
        "projectors": names(projectors),
        "scale_factors": whole_numbers("--scale-factors", scale_factors),
        "seeds": None if seeds is None else whole_numbers("--seeds", seeds, least=0),
        "steps": (align_steps, instruct_steps),
        "limit": limit,
        "quick": quick,
    }
    require_projectors(settings["projectors"])
    from transformers.utils.logging import disable_progress_bar

    from tokenpacker.compare import everything, report
    from tokenpacker.compare.preparation import prepare
    from tokenpacker.compare.runs import StageData

    files = ((data_align, images_align), (data_instruct, images_instruct))
    settings["data"] = tuple(StageData(path=path, images=images) for path, images in files)
    kept = f"what is finished stands in {output}: call it again and it goes on"
    disable_progress_bar()  # the runs have one of their own
    with keeping(kept, UNFINISHED), contextlib.redirect_stdout(sys.stderr):  # the Trainer prints its logs
        comparison, jobs = prepare(settings, output, foundation, jobs)
        command = shlex.join(["tokenpacker", *sys.argv[1:]])
        if not everything.compare(comparison, output, jobs=jobs, command=command):
            raise KeyboardInterrupt  # a signal ended a training, which has saved a checkpoint
    result = json.loads((output / report.JSON_FILE).read_text(encoding="utf-8"))
    print_result(as_json, result, (output / report.TABLE_FILE).read_text(encoding="utf-8").removesuffix("\n"))
