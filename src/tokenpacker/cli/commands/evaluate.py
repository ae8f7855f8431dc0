"""`tokenpacker evaluate`: accuracy on tasks with exact truth."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenpacker.cli.errors import INTERRUPTED
from tokenpacker.cli.loading import load_model
from tokenpacker.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    MaxImageTokensOption,
    ModelOption,
    ScaleFactorOption,
    VerboseOption,
)
from tokenpacker.cli.output import print_json, print_note

if TYPE_CHECKING:
    from tokenpacker.evaluate import TaskResult

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

    Ctrl-C ends it with the score of the questions asked so far.

    Examples:

        tokenpacker evaluate --tasks easy-vqa,fine-print --limit 200

        tokenpacker evaluate --tasks easy-vqa --scale-factor 4 --json
    """
    from tokenpacker.evaluate.tasks import find_task

    chosen = [find_task(name.strip()) for name in tasks.split(",") if name.strip()]
    if not chosen:
        raise ValueError("--tasks names no task; write for example --tasks easy-vqa,fine-print")
    budget: dict[str, Any] = {"scale_factor": scale_factor, "max_image_tokens": max_image_tokens}
    loaded, processor = load_model(model, verbose, device, dtype, **budget)
    from tokenpacker.evaluate import evaluate as run

    results, stopped = [], False
    for task in chosen:
        result: TaskResult | None
        try:
            result = run(loaded, processor, task, limit=limit, seed=seed, batch_size=batch_size, **budget)
        except KeyboardInterrupt as stop:
            stopped, result = True, getattr(stop, "result", None)
        if result is not None:
            results.append(result.to_dict())
            if not as_json:
                typer.echo(_line(result))
        if stopped:
            break
    if as_json:
        print_json({"results": results})
    if stopped:
        shown = "what is printed is the score of what was asked; " if results else ""
        print_note(f"stopped; {shown}call it again to ask all, or with --limit N to ask fewer")
        raise typer.Exit(INTERRUPTED)


def _line(result: "TaskResult") -> str:
    low, high = result.score.interval
    asked = result.score.num_questions
    part = f" asked before it was stopped, {asked:,} of {asked + result.num_unasked:,}" if result.num_unasked else ""
    return (
        f"{result.task}: {'partial, ' if part else ''}{result.accuracy:.1%} of {asked} questions{part}"
        f" (95 % interval {low:.1%} to {high:.1%}), {result.image_tokens:.0f} tokens an image,"
        f" {result.milliseconds_per_question:.1f} ms a question"
    )
