"""Asks the carried model about unseen images, measures it at every scale factor, and writes a report."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table as ConsoleTable

from tokenpacker.cli.errors import INTERRUPTED, mistakes_in_one_line
from tokenpacker.cli.loading import load_model
from tokenpacker.cli.output import print_note, survive_any_encoding
from tokenpacker.demo.examples import Example, ask_example, draw_examples
from tokenpacker.demo.page import Table, write_report
from tokenpacker.evaluate import evaluate, find_task
from tokenpacker.scenes import Sample
from tokenpacker.speed.machine import describe_machine, machine_text, versions_text
from tokenpacker.speed.question import Setting, measure_speed
from tokenpacker.text import check_text

SCALE_FACTORS = (2, 3, 4)
NUM_EXAMPLES = {"easy-vqa": 2, "fine-print": 3}
NUM_QUESTIONS = {"easy-vqa": 1000, "fine-print": 300}
NUM_IMAGES = {"easy-vqa": None, "fine-print": 80}  # the questions come from so many first images; None: from all
NUM_TIMED_IMAGES = 33  # three of them warm up
SEED = 2407
TITLES = {"easy-vqa": "easy-VQA", "fine-print": "Fine print"}
REMARKS = {
    "easy-vqa": "A public CNN+LSTM reports 87.6 % on all 9,673 test questions of this set.",
    "fine-print": "Larger images are cut into up to nine tiles, so all counts grow with the image.",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the demo with the options of the command line; prints a user's mistake in one line."""
    parser = argparse.ArgumentParser(prog="python -m tokenpacker.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo/report.html"), help="where the page goes")
    parser.add_argument("--model", help="a TokenPacker model: folder, hub id or name (default: the carried one)")
    parser.add_argument("--full-model", help="an MLP model to compare with (default: the carried one)")
    survive_any_encoding()
    options = parser.parse_args(arguments)
    with mistakes_in_one_line():
        for value in filter(None, vars(options).values()):
            check_text(str(value), repr(str(value)))
        try:
            run_demo(load_settings(options.model, options.full_model), options.output, Console())
        except KeyboardInterrupt:
            print_note("stopped; no report was written: call it again to start anew")
            sys.exit(INTERRUPTED)


def load_settings(packed_model: str | None = None, full_model: str | None = None) -> list[Setting]:
    """Returns TokenPacker at each scale factor, then the MLP with all tokens. None takes the package's own models."""
    model, processor = load_model(packed_model)
    full, full_processor = load_model(full_model or "tiny-mlp")
    return [
        *(Setting(label=f"TokenPacker s={s}", model=model, processor=processor, scale_factor=s) for s in SCALE_FACTORS),
        Setting(label="MLP, all tokens", model=full, processor=full_processor),
    ]


def run_demo(settings: Sequence[Setting], output: Path, console: Console) -> None:
    """Prints examples, accuracies and times, and writes them to a page at `output`; the last setting is the MLP."""
    start = time.perf_counter()
    samples = {task: find_task(task).load() for task in NUM_QUESTIONS}
    examples = [ask_example(settings, sample) for sample in draw_examples(samples, NUM_EXAMPLES, SEED)]
    console.print(examples_table(examples))
    tables = [measure(task, samples[task], settings) for task in NUM_QUESTIONS]
    for table in tables:
        console.print(results_table(table))
    easy, fine = (table.results for table in tables)
    machine = describe_machine(settings[0].model.device)
    dtype = str(settings[0].model.dtype).removeprefix("torch.")
    size_mb = sum(file.stat().st_size for file in Path(settings[0].model.name_or_path).glob("*.safetensors")) / 1e6
    write_report(
        output,
        headline=f"{100 * easy[0].accuracy:.1f} % right on easy-VQA with a quarter of the visual tokens",
        facts=[
            (f"{100 * easy[0].accuracy:.1f} %", "easy-VQA, a quarter of the tokens"),
            (f"{100 * easy[-1].accuracy:.1f} %", "easy-VQA, all tokens through an MLP"),
            (f"{100 * fine[0].accuracy:.1f} %", "fine print, a quarter of the tokens"),
            (f"{size_mb:.1f} MB", "weights of the model that travels with the package"),
        ],
        examples=examples,
        tables=tables,
        machine=f"{machine_text(machine)}, {dtype}, {machine['system']}; {versions_text(machine)}.",
        seconds=time.perf_counter() - start,
    )
    console.print(f"Report: [bold]{output}[/] ({time.perf_counter() - start:.0f} s)", soft_wrap=True)


def measure(task: str, samples: list[Sample], settings: Sequence[Setting]) -> Table:
    """Measures accuracy and times of every setting on a random part of a task."""
    part = samples[: NUM_IMAGES[task]]
    loaded = replace(find_task(task), load=lambda: part)
    limit = NUM_QUESTIONS[task]
    results = [
        evaluate(each.model, each.processor, loaded, scale_factor=each.scale_factor, limit=limit, seed=SEED)
        for each in settings
    ]
    speeds = measure_speed(settings, samples[:NUM_TIMED_IMAGES])
    return Table(
        name=TITLES[task],
        description=loaded.description,
        results=results,
        speeds=speeds,
        remark=REMARKS[task],
    )


def examples_table(examples: Sequence[Example]) -> ConsoleTable:
    """Returns the first setting's replies as a table for the console."""
    title = f"Questions about test images, {examples[0].replies[0].label}"
    table = ConsoleTable("Image", "Question", "Answer", "Truth", "Tokens", title=title, title_justify="left")
    for example in examples:
        reply, full = example.replies[0], example.replies[-1]
        color = "green" if reply.answer.is_correct else "red"
        tokens = f"{reply.num_image_tokens:,} of {full.num_image_tokens:,}"
        table.add_row(example.name, example.question, f"[{color}]{reply.answer.answer}[/]", example.truth, tokens)
    return table


def results_table(table: Table) -> ConsoleTable:
    """Returns a task's results as a table for the console."""
    columns = ("Projector", "Tokens", "Accuracy", "95 % interval", "Vision + projector, ms", "Language model, ms")
    shown = ConsoleTable(*columns, title=table.name, title_justify="left", caption=table.note, caption_justify="left")
    for result, speed in table.rows:
        low, high = result.score.interval
        shown.add_row(
            speed.label,
            f"{result.image_tokens:,.0f}",
            f"{100 * result.accuracy:.1f} %",
            f"{100 * low:.1f} to {100 * high:.1f}",
            f"{speed.vision_ms:.1f}",
            f"{speed.language_ms:.1f}",
        )
    return shown


if __name__ == "__main__":
    main()
