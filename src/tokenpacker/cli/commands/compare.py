"""`tokenpacker compare`: every projector under one recipe, accuracy and cost in one table."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenpacker.cli.arguments import require_projectors
from tokenpacker.cli.commands.train_recipes import UNFINISHED
from tokenpacker.cli.options import JsonOption
from tokenpacker.cli.output import print_json, print_note

if TYPE_CHECKING:
    from tokenpacker.compare.common_parts import Foundation
    from tokenpacker.compare.runs import Comparison

TINY = "align-tiny+instruct-tiny"
# Of the tiny recipes: what lets 45 runs finish within four hours of two idle cores.
STEPS = (400, 500)
# And what lets those of one seed finish within a quarter of an hour.
QUICK_STEPS, QUICK_LANGUAGE_STEPS, QUICK_LIMIT = (40, 50), 100, 300
DEFAULT_SEEDS, QUICK_SEEDS = (0, 1, 2), (0,)
BETWEEN_PROJECTORS = re.compile(r",(?![^\[\]]*\])")  # commas, but not those of a list: resampler:query_grid=[3,3]


def compare(
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FOLDER",
            help="Where results, models and the report go.",
            show_default="compare; compare-quick with --quick",
        ),
    ] = None,
    projectors: Annotated[
        str,
        typer.Option(
            "--projectors",
            metavar="NAME,...",
            help="Which ones; settings of its own behind a name: resampler:num_heads=2.",
            show_default="all installed ones",
        ),
    ] = "",
    scale_factors: Annotated[
        str, typer.Option("--scale-factors", metavar="S,...", help="Each is a training of its own; mlp has none.")
    ] = "2,4",
    seeds: Annotated[
        str | None, typer.Option("--seeds", metavar="N,...", help="Of weights and data order.", show_default="0,1,2")
    ] = None,
    align_steps: Annotated[
        int | None, typer.Option("--align-steps", metavar="N", min=1, help="Stage 1 of all.", show_default="400")
    ] = None,
    instruct_steps: Annotated[
        int | None, typer.Option("--instruct-steps", metavar="N", min=1, help="Stage 2 of all.", show_default="500")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="Questions of each task.", show_default="all")
    ] = None,
    foundation: Annotated[
        Path | None,
        typer.Option(
            "--foundation",
            metavar="FOLDER",
            help="Encoder and language model that all begin with, as `train tiny` makes them.",
            show_default="made below the output",
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", metavar="N", min=1, help="Runs side by side.", show_default="one a core; one on a GPU"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only see that everything runs; 15 minutes.")] = False,
    recipe: Annotated[
        str, typer.Option("--recipe", metavar="STAGE1+STAGE2", help="Real recipes, such as align-7b+instruct-7b.")
    ] = TINY,
    data_align: Annotated[str | None, typer.Option("--data-align", metavar="FILE", help="For a real recipe.")] = None,
    images_align: Annotated[
        str | None, typer.Option("--images-align", metavar="FOLDER", help="Where its image paths start.")
    ] = None,
    data_instruct: Annotated[
        str | None, typer.Option("--data-instruct", metavar="FILE", help="For a real recipe.")
    ] = None,
    images_instruct: Annotated[
        str | None, typer.Option("--images-instruct", metavar="FOLDER", help="Where its image paths start.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train every projector by one recipe, ask all test questions, measure the time to the first token.

    Encoder, language model, data and steps are the same for all. Call it again after an interruption and it goes on:
    what is finished stands in results.jsonl. Then compare.md, compare.json and compare.png are written.

    Exit code 0: all is finished. 75: a signal stopped it. 2: it cannot be run at all.

    Examples:

        tokenpacker compare --output runs/compare

        tokenpacker compare --quick --projectors token-packer,average-pool,mlp

        tokenpacker compare --recipe align-7b+instruct-7b --data-align A.json --data-instruct B.json --seeds 0
    """
    is_tiny = recipe == TINY
    output = output or Path("compare-quick" if quick else "compare")
    steps = (None, None) if not is_tiny else QUICK_STEPS if quick else STEPS
    settings: dict[str, Any] = {
        "recipe": _stages(recipe),
        "projectors": tuple(name.strip() for name in BETWEEN_PROJECTORS.split(projectors) if name.strip()),
        "scale_factors": _numbers("--scale-factors", scale_factors, least=1),
        "seeds": (QUICK_SEEDS if quick else DEFAULT_SEEDS) if seeds is None else _numbers("--seeds", seeds, least=0),
        "steps": (align_steps or steps[0], instruct_steps or steps[1]),
        "limit": limit or (QUICK_LIMIT if quick and is_tiny else None),
        "quick": quick,
    }
    if foundation is not None and not foundation.is_dir():
        raise ValueError(f"--foundation {foundation} is no folder; name one, or leave it out to have one made")
    require_projectors(settings["projectors"])
    from tokenpacker.compare.everything import compare as run

    settings |= _data(((data_align, images_align), (data_instruct, images_instruct)))
    with _prints_on_stderr():
        try:
            comparison, jobs = _comparison(settings, output, foundation, jobs, quick, is_tiny)
            command = shlex.join(["tokenpacker", *sys.argv[1:]])
            finished = run(comparison, output, jobs=jobs, command=command)
        except KeyboardInterrupt:  # outside of the trainings, which end with a checkpoint
            finished = False
    if not finished:
        print_note(f"stopped; what is finished stands in {output}: call it again and it goes on")
        raise typer.Exit(UNFINISHED)
    from tokenpacker.compare.report import JSON_FILE, TABLE_FILE

    if as_json:
        print_json(json.loads((output / JSON_FILE).read_text(encoding="utf-8")))
    else:
        typer.echo((output / TABLE_FILE).read_text(encoding="utf-8"), nl=False)


def _comparison(
    settings: dict[str, Any], output: Path, folder: Path | None, jobs: int | None, quick: bool, is_tiny: bool
) -> tuple[Comparison, int]:
    """What is compared, and how many runs side by side. The foundation is made where it is not there."""
    import torch

    from tokenpacker.compare.runs import Comparison
    from tokenpacker.speed.machine import usable_cores

    on_gpu = torch.cuda.is_available()
    jobs = jobs or (1 if on_gpu or not is_tiny else usable_cores())
    if not is_tiny:
        for name, value in (("--foundation", folder), ("--quick", quick or None)):
            if value is not None:
                raise ValueError(f"{name} belongs to the tiny recipes; leave it out, or leave --recipe out")
        return Comparison(**settings), jobs
    Comparison(**settings)  # its mistakes are told before the foundation is made
    foundation = _foundation(output, folder, quick)
    comparison = Comparison(
        vision_tower=str(foundation.encoder),
        language_model=str(foundation.language_model),
        foundation=foundation.digest,
        # Measured: as many runs as cores, each drawing its own pictures, finish soonest.
        num_workers=0 if jobs > 1 else None,
        **settings,
    )
    return comparison, jobs


def _foundation(output: Path, folder: Path | None, quick: bool) -> Foundation:
    from tokenpacker.compare.common_parts import Foundation, make_foundation

    if folder is not None:
        return Foundation.find(folder)
    steps = QUICK_LANGUAGE_STEPS if quick else None
    return make_foundation(output / ("foundation-quick" if quick else "foundation"), language_steps=steps)


def _stages(recipe: str) -> tuple[str, str]:
    align, plus, instruct = recipe.partition("+")
    if not (align and plus and instruct):
        raise ValueError(f"--recipe {recipe} must be two names with a plus between, as in align-7b+instruct-7b")
    return align, instruct


def _data(files: tuple[tuple[str | None, str | None], ...]) -> dict[str, Any]:
    from tokenpacker.compare.runs import StageData

    return {"data": tuple(StageData(path=path, images=images) for path, images in files)}


def _numbers(option: str, text: str, least: int) -> tuple[int, ...]:
    """Whole numbers with commas between."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() and int(part) >= least for part in parts):
        raise ValueError(f"{option} {text!r} must be whole numbers of at least {least} with commas between, as in 2,4")
    return tuple(map(int, parts))


@contextlib.contextmanager
def _prints_on_stderr() -> Any:
    """Within it, standard output stays free for the result: the Trainer prints its logs."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # runs have one of their own
    with contextlib.redirect_stdout(sys.stderr):
        yield
