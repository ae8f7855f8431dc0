from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tokenpacker.compare import report
from tokenpacker.compare.marked_tables import BEGIN, END
from tokenpacker.compare.report import Report, put_between_marks, write_report
from tokenpacker.compare.results import append_row, of_one_protocol, read_rows

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {"processor": "a processor", "cores": 2, "threads": 1}


def run_row(projector: str, tokens: int, seed: int, fine_print: int, **content) -> dict:
    """A row whose model was right in `fine_print` of 1,000 questions with HD, and in half as many without."""
    easy = {"correct": 9000 + seed, "questions": 10000}
    scores = {
        "easy-vqa": {"one-tile": easy, "hd": easy},
        "fine-print": {
            "hd": {"correct": fine_print, "questions": 1000},
            "one-tile": {"correct": fine_print // 2, "questions": 1000},
        },
    }
    return {
        "kind": "run",
        "protocol": "p",
        "fingerprint": f"{projector}/{tokens}/{seed}",
        "projector": projector,
        "scale_factor": {144: 1, 36: 2, 9: 4}[tokens],
        "seed": seed,
        "quick": False,
        "recipe": ["align-tiny", "instruct-tiny"],
        "tokens_per_tile": tokens,
        "parameters": 1234 * tokens,
        "steps": {"align": 450, "instruct": 600},
        "losses": {"align": 0.5, "instruct": 0.25 + seed / 100},
        "scores": scores,
        "seconds": {"all": 300},
        "date": f"2026-01-0{1 + seed}T12:00:00+00:00",
        "command": "tokenpacker compare",
        "machine": MACHINE,
        **content,
    }


def speed_row(*entries: tuple[str, int, float]) -> dict:
    """Times of (projector, scale factor, milliseconds with one tile); an HD image takes eight times as long."""
    rows = [
        {
            "projector": projector,
            "scale_factor": scale_factor,
            "mode": mode,
            "milliseconds": {"first_token": {"median": factor * milliseconds, "p95": 99.0}},
            "multiplications": {"vision": factor * 10**9, "projector": 5 * 10**8, "prefill": 10**9},
        }
        for mode, factor in (("one-tile", 1), ("hd", 8))
        for projector, scale_factor, milliseconds in entries
    ]
    common = {"kind": "speed", "protocol": "p", "fingerprint": "s", "quick": False, "rounds": 30}
    return {**common, "rows": rows, "date": "2026-01-04T12:00:00+00:00", "machine": MACHINE}


ROWS = [
    run_row("average-pool", 9, 0, 700),
    run_row("mlp", 144, 0, 850),
    run_row("token-packer", 9, 0, 800),
    run_row("token-packer", 9, 1, 820),
    run_row("token-packer", 9, 2, 840),
    speed_row(("token-packer", 4, 12.5), ("mlp", 1, 20.0)),
]


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]


def test_the_tables_numbers_come_from_the_rows():
    header, _, mlp, pool, packer = cells(Report(ROWS).to_markdown())
    assert header[:5] == ["projector", "tokens", "easy-VQA", "fine print, HD", "fine print, one tile"]
    assert mlp == ["mlp", "144", "90.0", "85.0", "42.5", "177,696", "2.50", "9.50", "20.0", "160"]
    assert pool == ["average-pool", "9", "90.0", "70.0", "35.0", "11,106", "-", "-", "-", "-"]  # no time was measured
    assert packer[:5] == ["token-packer", "9", "90.0 ± 0.0", "82.0 ± 5.0", "41.0 ± 2.5"]
    assert packer[-2:] == ["12.5", "100"]


def test_differences_from_token_packer_are_told_seed_by_seed():
    pools = [run_row("average-pool", 9, seed, 790 + 20 * seed) for seed in (1, 2)]
    header, _, pool = cells(Report([*ROWS, *pools]).differences())  # the mlp's tokens are others
    assert header == ["projector", "tokens", "easy-VQA", "fine print, HD", "fine print, one tile"]
    # Seeds 0, 1, 2 are 10, 1 and 1 points below.
    assert pool == ["average-pool", "9", "+0.0 ± 0.0", "-4.0 ± 12.9", "-2.0 ± 6.5"]
    assert Report(ROWS[:2]).differences() == ""


def test_what_packing_loses_is_told_from_all_tokens():
    _, _, pool, packer = cells(Report(ROWS).differences("mlp"))
    assert pool == ["average-pool", "9", "+0.0", "-15.0", "-7.5"]
    assert packer == ["token-packer", "9", "+0.0", "-5.0", "-2.5"]  # the mlp has seed 0 alone


def test_below_the_table_stands_what_it_came_from():
    text = Report(ROWS).to_markdown()
    assert "Seeds 0, 1, 2: mean and 95 % interval over them (Student's t)." in text
    assert "Not all are finished: mlp at 144 tokens has 1, average-pool at 9 tokens has 1." in text
    assert "450 + 600 steps, 5 runs of 5.0 minutes on average, 2026-01-01 to 2026-01-03" in text
    assert "a processor, 2 cores, 1 thread a process. Times: 30 rounds, 2026-01-04" in text


def test_a_quick_comparison_is_marked_in_every_output(tmp_path):
    write_report(tmp_path, [*ROWS, run_row("mlp", 144, 1, 850, quick=True)])
    assert "Quick run" in (tmp_path / "compare.md").read_text().splitlines()[0]
    assert json.loads((tmp_path / "compare.json").read_text())["quick"] is True
    plain = tmp_path / "plain"
    plain.mkdir()
    write_report(plain, ROWS)
    assert "Quick" not in (plain / "compare.md").read_text()
    assert (tmp_path / "compare.png").read_bytes() != (plain / "compare.png").read_bytes()  # its title says so


def test_json_has_the_means_unrounded_and_all_rows(tmp_path):
    write_report(tmp_path, ROWS)
    content = json.loads((tmp_path / "compare.json").read_text())
    packer = next(group for group in content["groups"] if group["projector"] == "token-packer")
    assert packer["accuracy_percent"]["fine-print"]["hd"]["mean"] == pytest.approx(82.0)
    assert packer["last_loss"]["instruct"]["mean"] == pytest.approx(0.26)
    assert (packer["seeds"], len(content["runs"])) == ([0, 1, 2], 5)


def test_real_recipes_have_losses_in_place_of_accuracies():
    rows = [{**row, "scores": {}} if row["kind"] == "run" else row for row in ROWS]
    header, _, mlp, *_ = cells(Report(rows).to_markdown())
    assert header[2:4] == ["loss, stage 1", "loss, stage 2"]
    assert mlp[2:4] == ["0.500", "0.250"]


def test_the_script_rewrites_report_and_documents(tmp_path):
    for row in [run_row("mlp", 144, 0, 1, protocol="old"), *ROWS]:
        append_row(tmp_path / "results.jsonl", row)
    document = tmp_path / "document.md"
    begin, end = BEGIN.format("compare"), END.format("compare")
    document.write_text(f"before\n{begin}\nan old table\n{end}\nafter\n")
    report.main([str(tmp_path), str(document)])
    table = (tmp_path / "compare.md").read_text()
    assert document.read_text() == f"before\n{begin}\n{table}{end}\nafter\n"
    assert "0.1" not in cells(table)[2]


def test_a_document_without_marks_and_a_file_without_runs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must have <!-- compare:begin --> and <!-- compare:end --> once each"):
        put_between_marks("text", Report(ROWS))
    with pytest.raises(ValueError, match="no row of a finished run"):
        report.main([str(tmp_path)])


def test_two_comparisons_have_their_places_in_one_document(tmp_path):
    for row in ROWS:
        append_row(tmp_path / "results.jsonl", row)
    document = tmp_path / "document.md"
    places = [f"{BEGIN.format(mark)}\n{END.format(mark)}\n" for mark in ("compare", "options", "options-differences")]
    document.write_text("".join(places))
    report.main([str(tmp_path), str(document), "--mark", "options"])
    untouched, written = document.read_text().split(END.format("compare"))
    assert untouched == places[0].split(END.format("compare"))[0]
    assert (tmp_path / "compare.md").read_text() in written
    assert Report(ROWS).differences() in written


def flat(content, place="") -> dict:
    """The single values of JSON content, each under its place."""
    if not isinstance(content, (dict, list)):
        return {place: content}
    entries = content.items() if isinstance(content, dict) else enumerate(content)
    return {key: value for name, entry in entries for key, value in flat(entry, f"{place}/{name}").items()}


@pytest.mark.parametrize(
    ("folder", "document", "mark"),
    [
        ("docs/comparison", "docs/comparison.md", "compare"),
        ("docs/comparison/options", "docs/comparison.md", "options"),
    ],
)
def test_numbers_in_documents_are_those_of_the_committed_rows(folder, document, mark, tmp_path):
    committed = ROOT / folder
    shutil.copy(committed / "results.jsonl", tmp_path)
    expected = write_report(tmp_path, of_one_protocol(read_rows(tmp_path / "results.jsonl")))
    assert not expected.is_quick
    assert (committed / "compare.md").read_text() == (tmp_path / "compare.md").read_text()
    stored, made = (flat(json.loads((place / "compare.json").read_text())) for place in (committed, tmp_path))
    assert stored.keys() == made.keys()
    for place, value in stored.items():
        if isinstance(value, float):
            assert made[place] == pytest.approx(value, rel=1e-9), place  # Python 3.10 sums in another order
        else:
            assert made[place] == value, place
    text = (ROOT / document).read_text(encoding="utf-8")
    assert put_between_marks(text, expected, mark) == text
