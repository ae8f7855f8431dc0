"""docs/evaluation.md says what the code does."""

import doctest
from pathlib import Path, PurePosixPath

from tokenpacker.evaluate.layouts.llava import FOLDERS, LAYOUTS
from tokenpacker.evaluate.metrics import METRICS
from tokenpacker.evaluate.protocols import benchmarks, protocol, protocol_names
from tokenpacker.evaluate.published import HEADLINES, published
from tokenpacker.evaluate.results.elastic_curve import curve_table
from tokenpacker.evaluate.results.results_folder import ResultsFolder
from tokenpacker.evaluate.submissions import SUBMISSIONS

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "evaluation.md"
TEXT = PAGE.read_text(encoding="utf-8")
OURS = ("token-packer", "TokenPacker-HD-7b-9patch-144token")


def file_rows():
    """A row for each benchmark and its splits with files of their own: question file, images, references."""
    for name, layouts in LAYOUTS.items():
        folder = PurePosixPath(FOLDERS.get(name, (name,))[0])

        def below(names, folder=folder):
            return " or ".join(f"`{folder / each}`" for each in names if "../" not in each)

        splits = {layout.split: [] for layout in layouts}
        for layout in layouts:
            splits[layout.split].append(layout)
        rows = {}
        for split, parts in splits.items():
            questions, images = below([part.questions for part in parts]), below(filter(None, parts[0].images))
            cells = f"{questions} | {images or '-'} | {below(parts[0].annotations) or '-'}"
            rows.setdefault(cells, []).append(split)
        for cells, names in rows.items():
            yield f"| {name} | {', '.join(names)} | {cells} |"


def benchmark_rows():
    """A row for each benchmark: command, protocols, metric, lengths, published scores, submission file."""
    for name in benchmarks():
        protocols = [protocol(name, each) for each in protocol_names(name)]
        metric = METRICS[protocols[0].metric]
        lengths = ", ".join(str(each.max_new_tokens) for each in protocols)
        scores = ", ".join(f"{row.score} ({row.tokens})" for row in published(name) if row.model in OURS)
        headline = f"{metric.name}: {HEADLINES[name]}" if name in HEADLINES else metric.name
        file = f"{SUBMISSIONS[name][0]}" if name in SUBMISSIONS else "-"
        names = ", ".join(protocol_names(name))
        command = "FILE.jsonl" if name == "own" else name
        yield f"| `--tasks {command}` | {names} | {headline} | {lengths} | {scores or '-'} | {file} |"


def test_the_table_lists_every_benchmark_with_protocols_metric_and_published_scores():
    for row in benchmark_rows():
        assert row in TEXT


def test_the_table_of_files_is_that_of_the_code():
    for row in file_rows():
        assert row in TEXT


def test_the_example_prints_what_the_page_shows():
    failed, tried = doctest.testfile(str(PAGE), module_relative=False)
    assert tried >= 6
    assert failed == 0


def test_the_elastic_curve_is_that_of_the_results():
    assert f"<!-- curve:begin -->\n{curve_table(ResultsFolder(DOCS / 'evaluation'))}<!-- curve:end -->" in TEXT
    assert "](evaluation/curve.png)" in TEXT
    assert (DOCS / "evaluation" / "curve.png").is_file()
