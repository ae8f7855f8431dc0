"""`tokenpacker evaluate`: accuracy on tasks with exact truth."""

from typing import Annotated

import typer

from tokenpacker.cli.models import load_model
from tokenpacker.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    MaxImageTokensOption,
    ModelOption,
    ScaleFactorOption,
    VerboseOption,
)
from tokenpacker.cli.output import print_json

DEFAULT_TASKS = "easy-vqa,fine-print"


def evaluate(
    tasks: Annotated[
        str, typer.Option("--tasks", metavar="TASK,...", help="Tasks by name, separated by commas.")
    ] = DEFAULT_TASKS,
    limit: Annotated[
        int | None,
        typer.Option("--limit", metavar="N", help="Ask N questions of each task, drawn at random.", show_default="all"),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Decides which questions --limit draws.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help="Questions at once.")] = 64,
    model: ModelOption = None,
    scale_factor: ScaleFactorOption = None,
    max_image_tokens: MaxImageTokensOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure a model's accuracy: free greedy answers, exact match, with 95 % intervals.

    Examples:

        tokenpacker evaluate --tasks easy-vqa,fine-print --limit 200

        tokenpacker evaluate --tasks easy-vqa --scale-factor 4 --json
    """
    from tokenpacker.evaluate import evaluate as run
    from tokenpacker.evaluate import find_task

    chosen = [find_task(name.strip()) for name in tasks.split(",") if name.strip()]
    if not chosen:
        raise ValueError("--tasks names no task; write for example --tasks easy-vqa,fine-print")
    loaded, processor = load_model(model, verbose, device, dtype)
    results = []
    for task in chosen:
        result = run(
            loaded,
            processor,
            task,
            scale_factor=scale_factor,
            max_image_tokens=max_image_tokens,
            limit=limit,
            seed=seed,
            batch_size=batch_size,
        )
        results.append(result.to_dict())
        if not as_json:
            low, high = result.score.interval
            typer.echo(
                f"{result.task}: {result.accuracy:.1%} of {result.score.num_questions} questions"
                f" (95 % interval {low:.1%} to {high:.1%}), {result.image_tokens:.0f} tokens an image,"
                f" {result.milliseconds_per_question:.1f} ms a question"
            )
    if as_json:
        print_json({"results": results})
