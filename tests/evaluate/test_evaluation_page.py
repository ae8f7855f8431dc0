"""docs/evaluation.md says what the code does."""

import doctest
from pathlib import Path

from tokenpacker.evaluate.protocols import benchmarks, protocol, protocol_names

PAGE = Path(__file__).resolve().parents[2] / "docs" / "evaluation.md"


def test_the_table_lists_every_benchmark_with_its_protocols_and_metric():
    text = PAGE.read_text(encoding="utf-8")
    for name in benchmarks():
        protocols = [protocol(name, each) for each in protocol_names(name)]
        metrics = ", ".join(dict.fromkeys(each.metric for each in protocols))
        lengths = ", ".join(str(each.max_new_tokens) for each in protocols)
        assert f"| {name} | {', '.join(protocol_names(name))} | {metrics} | {lengths} |" in text


def test_the_example_prints_what_the_page_shows():
    failed, tried = doctest.testfile(str(PAGE), module_relative=False)
    assert tried >= 6
    assert failed == 0
