"""`tokenpacker evaluate`: scores on benchmarks, on tasks with exact truth, and on your own questions."""

from __future__ import annotations

import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenpacker.cli import options
from tokenpacker.cli.arguments import names, one_scale_factor, refuse, whole_numbers
from tokenpacker.cli.errors import INTERRUPTED
from tokenpacker.cli.loading import load_model
from tokenpacker.cli.model_files import Geometry, find_model
from tokenpacker.cli.options import flag, number, value
from tokenpacker.cli.output import print_json, print_note

if TYPE_CHECKING:
    from tokenpacker.evaluate.answer_rows import Plan
    from tokenpacker.evaluate.bench_tasks import Bench

TASKS = "easy-vqa,fine-print"
SHOWN = 3  # problems of a task
BATCH_SIZE = 64


def evaluate(
    tasks: Annotated[str | None, value("TASK,...", "Names, or FILE.jsonl.", TASKS)] = None,
    data: Annotated[str | None, value("DIR|hub", "Where benchmarks are.", "needed by them")] = None,
    scale_factor: Annotated[str | None, value("S|auto,...", "Pack S x S patches into a token.", "model's")] = None,
    max_image_tokens: Annotated[str | None, value("N,...", "Most tokens of an image.", "no limit")] = None,
    out: Annotated[Path | None, value("FOLDER", "Keep answers, results and page here.", "nowhere")] = None,
    compare: Annotated[tuple[Path, Path] | None, value("A B", "Compare two such folders.", "no")] = None,
    limit: options.Limit = None,
    model: options.Model = None,
    as_json: options.Json = False,
    protocol: Annotated[str | None, value("NAME", "Prompts and decoding.", "task's first")] = None,
    metric: Annotated[str | None, value("NAME", "Metric of FILE.jsonl.", "exact")] = None,
    split: Annotated[str | None, value("NAME", "Split of a benchmark.", "the published")] = None,
    skip_broken: Annotated[bool, flag("--skip-broken", "Leave broken and repeated questions out.")] = False,
    overwrite: Annotated[bool, flag("--overwrite", "Replace another run's results.")] = False,
    seed: Annotated[int, value("N", "Seed of --limit.")] = 0,
    batch_size: Annotated[int, number("Questions at once.")] = BATCH_SIZE,
    device: options.Device = None,
    dtype: options.Dtype = None,
    verbose: options.Verbose = False,
) -> None:
    """Score a model. A stopped run with --out goes on when called again.

    With several scale factors or budgets, each is a run of its own.

    Examples:
        tokenpacker evaluate --tasks easy-vqa,fine-print --limit 200
        tokenpacker evaluate --tasks pope,gqa --data DIR --scale-factor 2,3 --out RESULTS
        tokenpacker evaluate --tasks mine.jsonl --metric contains
        tokenpacker evaluate --compare RESULTS OTHERS --out page.html
    """
    if compare is not None:
        others = {"--tasks": tasks, "--data": data, "--scale-factor": scale_factor, "--limit": limit, "--model": model}
        others |= {"--max-image-tokens": max_image_tokens, "--protocol": protocol, "--metric": metric, "--split": split}
        others |= {"--skip-broken": skip_broken, "--overwrite": overwrite, "--device": device, "--dtype": dtype}
        others |= {"--seed": seed or None, "--batch-size": None if batch_size == BATCH_SIZE else batch_size}
        refuse(others, "has no effect with --compare; leave it out")
        _compare(*compare, out, as_json)
        return
    from tokenpacker.evaluate.bench_tasks import OWN_SUFFIX, kind_of

    chosen, plans = names(TASKS if tasks is None else tasks), _plans(scale_factor, max_image_tokens)
    if data is not None and data.endswith(OWN_SUFFIX):
        raise ValueError(f"--data {data} is a file; give the folder of the benchmarks, or {data} as one of the --tasks")
    if not chosen:
        raise ValueError("--tasks names no task; write for example --tasks easy-vqa,fine-print")
    named = {"--data": data, "--protocol": protocol, "--metric": metric, "--split": split, "--overwrite": overwrite}
    loading = {"verbose": verbose, "device": device, "dtype": dtype}
    drawing: dict[str, Any] = {"limit": limit, "seed": seed}
    if out is None and all(kind_of(name) == "ours" for name in chosen):
        refuse({**named, "--skip-broken": skip_broken}, "is for benchmarks, FILE.jsonl or --out; leave it out")
        _ask_tasks(chosen, plans, model, loading, as_json, {**drawing, "batch_size": batch_size})
        return
    if out is None:
        refuse({"--overwrite": overwrite}, "needs --out, whose results it replaces")
    benches = _find_benches(chosen, data, protocol, metric, split, skip_broken)
    drawing |= {"skip_broken": skip_broken}
    _run_benches(benches, plans, out, model, loading, as_json, drawing, batch_size, overwrite)


def _plans(scale_factor: str | None, max_image_tokens: str | None) -> list[Plan]:
    """Each scale factor and each budget by itself; one scale factor holds for all budgets."""
    from tokenpacker.evaluate.answer_rows import Plan

    factors = [one_scale_factor("--scale-factor", part) for part in names(scale_factor or "")]
    if scale_factor is not None and not factors:
        raise ValueError("--scale-factor names none; write for example --scale-factor 2,auto")
    budgets = [] if max_image_tokens is None else whole_numbers("--max-image-tokens", max_image_tokens)
    if len(factors) <= 1:
        one = factors[0] if factors else None
        return [Plan(scale_factor=one, max_image_tokens=budget) for budget in budgets or (None,)]
    return [Plan(scale_factor=factor) for factor in factors] + [Plan(max_image_tokens=budget) for budget in budgets]


def _check_plans(model: str | None, plans: list[Plan]) -> None:
    """Raises ValueError for a scale factor or budget that no image can meet."""
    geometry = Geometry.of_model(find_model(model))
    for plan in plans:
        geometry.check(plan.scale_factor, plan.max_image_tokens)


def _ask_tasks(
    chosen: tuple[str, ...],
    plans: list[Plan],
    model: str | None,
    loading: dict[str, Any],
    as_json: bool,
    asking: dict[str, Any],
) -> None:
    """Our own tasks, without a folder."""
    from dataclasses import asdict
    from itertools import product

    from tokenpacker.evaluate.tasks import find_task

    found = [find_task(name) for name in chosen]
    _check_plans(model, plans)
    loaded, processor = load_model(model, **loading)
    from tokenpacker.evaluate import evaluate as run

    results, stopped = [], False
    for task, plan in product(found, plans):
        result: Any
        try:
            result = run(loaded, processor, task, **asdict(plan), **asking)
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


def _find_benches(
    chosen: tuple[str, ...],
    data: str | None,
    protocol: str | None,
    metric: str | None,
    split: str | None,
    skip_broken: bool,
) -> list[Bench]:
    """The tasks with their questions; what is wrong with these is printed."""
    from tokenpacker.evaluate.bench_tasks import find_bench, kind_of

    own = {name for name in chosen if kind_of(name) == "own"}
    listed = {name for name in chosen if kind_of(name) == "benchmark"}
    if not own | listed:
        refuse({"--protocol": protocol}, "is for benchmarks and FILE.jsonl; leave it out")
    if not own:
        refuse({"--metric": metric}, "is for FILE.jsonl; a benchmark has its own metric, so leave it out")
    if not listed:
        refuse({"--data": data, "--split": split}, "is for benchmarks; leave it out")
    benches = []
    for name in chosen:
        bench = find_bench(
            name,
            data=data if name in listed else None,
            protocol=protocol if name in own | listed else None,
            metric=metric if name in own else None,
            split=split if name in listed else None,
        )
        _print_problems(bench, skip_broken)
        benches.append(bench)
    return benches


def _print_problems(bench: Bench, skip_broken: bool) -> None:
    problems = bench.loaded.problems
    if not problems:
        return
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in Counter(problem.kind for problem in problems).items())
    fate = "left out of the score" if skip_broken else "kept in the score; --skip-broken leaves them out"
    print_note(f"{bench.name}: {len(problems):,} problem{'s' if len(problems) > 1 else ''} ({kinds}), {fate}")
    for problem in problems[:SHOWN]:
        print_note(f"  {problem.where}: {problem.text}")
    if len(problems) > SHOWN:
        print_note(f"  and {len(problems) - SHOWN:,} more, all of which run.json in --out FOLDER lists")


def _run_benches(
    benches: list[Bench],
    plans: list[Plan],
    out: Path | None,
    model: str | None,
    loading: dict[str, Any],
    as_json: bool,
    drawing: dict[str, Any],
    batch_size: int,
    overwrite: bool,
) -> None:
    from tokenpacker.batch.local_model import model_digest
    from tokenpacker.evaluate.bench_folder import RunSettings
    from tokenpacker.evaluate.bench_run import run_benches, summary

    _check_plans(model, plans)
    folder = find_model(model)
    settings = RunSettings(
        model=model or folder.name, fingerprint=model_digest(folder), dtype=loading["dtype"], **drawing
    )
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory())) if out is None else out.expanduser()
        outcome = run_benches(
            benches,
            plans,
            place,
            lambda: load_model(model, **loading),
            settings,
            batch_size=batch_size,
            overwrite=overwrite,
            report=out is not None,
            on_result=lambda result: None if as_json else typer.echo(summary(result)),
            on_note=print_note,
        )
    if as_json:
        print_json({"results": outcome.results, "out": out and str(out), "stopped": outcome.stopped})
    if outcome.stopped:
        goes_on = "the same command goes on" if out else "with --out FOLDER, the same command would go on"
        print_note(f"stopped; {goes_on}")
        raise typer.Exit(INTERRUPTED)
    if out is not None and not as_json:
        print_note(f"the page is {place / 'report.html'}")


def _compare(first: Path, second: Path, out: Path | None, as_json: bool) -> None:
    from tokenpacker.evaluate.results.results_comparison import compare_results

    if out is not None and out.suffix != ".html":
        raise ValueError(f"--out {out} must end in .html with --compare, which writes a page")
    comparison = compare_results(first, second)
    if as_json:
        print_json(comparison.to_dict())
    else:
        typer.echo("\n".join(comparison.lines()))
    if out is not None:
        print_note(f"the page is {comparison.write(out)}")
