"""`tokenpacker evaluate`: accuracy on tasks with exact truth."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenpacker.cli import options
from tokenpacker.cli.arguments import names
from tokenpacker.cli.errors import INTERRUPTED
from tokenpacker.cli.loading import load_model
from tokenpacker.cli.options import number, value
from tokenpacker.cli.output import print_json, print_note

if TYPE_CHECKING:
    from tokenpacker.evaluate import TaskResult


def evaluate(
    tasks: Annotated[str, value("TASK,...", "Tasks by name.")] = "easy-vqa,fine-print",
    limit: options.Limit = None,
    seed: options.Seed = 0,
    batch_size: Annotated[int, number("Questions at once.")] = 64,
    model: options.Model = None,
    scale_factor: options.ScaleFactor = None,
    max_image_tokens: options.MaxImageTokens = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure accuracy: greedy answers, exact match, 95 % intervals.

    Ctrl-C ends it with the score of the questions asked so far.

    Examples:
        tokenpacker evaluate --tasks easy-vqa,fine-print --limit 200
        tokenpacker evaluate --tasks easy-vqa --scale-factor 4 --json
    """
    from tokenpacker.evaluate.tasks import find_task

    chosen = [find_task(name) for name in names(tasks)]
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
                typer.echo(result.summary())
        if stopped:
            break
    if as_json:
        print_json({"results": results})
    if stopped:
        shown = "what is printed is the score of what was asked; " if results else ""
        print_note(f"stopped; {shown}call it again to ask all, or with --limit N to ask fewer")
        raise typer.Exit(INTERRUPTED)
