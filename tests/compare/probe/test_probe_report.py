from __future__ import annotations

import itertools
import json

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from matplotlib.figure import Figure
from matplotlib.text import Text

from tokenpacker.compare.intervals import Mean
from tokenpacker.compare.probe.probe_figures import draw_over_steps, draw_over_tokens
from tokenpacker.compare.probe.probe_report import Report, main, write_report


def rows(projector: str, accuracies: list[float], tokens: int = 36, steps: int = 400, **more) -> list[dict]:
    """One row for each seed."""
    return [
        {
            "kind": "run",
            "protocol": "p",
            "fingerprint": f"{projector} {tokens} {steps} {seed}",
            "quick": False,
            "questions": "letters",
            "encoder": "craft",
            "split": "test",
            "projector": projector,
            "tokens": tokens,
            "steps": steps,
            "seed": seed,
            "accuracy": accuracy,
            "curve": [[steps // 2, accuracy / 2], [steps, accuracy]],
            "step_ms": 50.0 if projector == "token-packer" else 20.0,
            "seconds": 30.0,
            "parameters": 1000,
            "date": "2026-11-30T12:00:00+00:00",
            "command": "tokenpacker probe",
            "machine": {"processor": "a CPU", "cores": 2, "threads": 1},
            **more,
        }
        for seed, accuracy in enumerate(accuracies)
    ]


def verdicts(*others: list[dict], reference: list[float]) -> dict[str, str]:
    report = Report([*rows("token-packer", reference), *itertools.chain(*others)])
    return {group["projector"]: group.get("verdict", "-") for group in report.to_dict()["groups"]}


def test_better_is_a_paired_difference_whose_interval_excludes_zero():
    reference = [0.50, 0.60, 0.70]
    found = verdicts(
        rows("above", [0.52, 0.625, 0.72]),  # +2.2 +- 0.7, though both vary by ten points over seeds
        rows("below", [0.48, 0.575, 0.68]),
        rows("near", [0.55, 0.58, 0.72]),
        rows("few", [0.9, 0.9]),
        rows("elsewhere", [0.9, 0.9, 0.9], tokens=9),
        reference=reference,
    )
    assert found == {
        "above": "better",
        "below": "worse",
        "near": "undecided",
        "few": "too few seeds",
        "elsewhere": "-",
        "token-packer": "-",
    }


def test_a_table_tells_the_accuracy_of_each_sort_of_question():
    several = [{**row, "sorts": {"kind": 0.4, "color": row["accuracy"]}} for row in rows("mlp", [0.6, 0.7, 0.8])]
    text = Report([*several, *rows("token-packer", [0.5] * 3)]).to_markdown()  # rows of before have no sorts
    assert [line for line in text.splitlines() if "kind, %" in line]
    (line,) = (line for line in text.splitlines() if "40.0 ± 0.0" in line)
    assert "70.0 ± 24.8" in line
    assert "kind, %" not in Report(rows("token-packer", [0.5] * 3)).to_markdown()


def test_only_the_test_pictures_give_a_verdict():
    for more in ({"split": "dev"}, {"quick": True}):
        report = Report([*rows("token-packer", [0.5] * 3, **more), *rows("mlp", [0.9, 0.91, 0.92], **more)])
        assert report.verdicts() == ""
        assert "verdict" not in json.dumps(report.to_dict()["groups"])
        assert "**+41.0" not in report.to_markdown()
        assert report.to_markdown().startswith(("**Development pictures", "**Quick run"))


def test_the_table_has_accuracies_differences_parameters_and_step_times():
    other = [*rows("ldp-v2", [0.6, 0.61, 0.62]), *rows("ldp-v2", [0.8], steps=1200)]
    report = Report([*rows("token-packer", [0.5, 0.51, 0.52]), *other], [])
    line = next(line for line in report.to_markdown().splitlines() if line.startswith("| ldp-v2"))
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        *("ldp-v2", "36", "61.0 ± 2.5", "**+10.0 ± 0.0**", "80.0", "-", "1,000", "0.40")
    ]
    assert "- **36 tokens, 400 steps.** Against token-packer: better: ldp-v2." in report.verdicts()
    (group,) = (group for group in report.to_dict()["groups"] if group["steps"] == 1200)
    assert group["curve_percent"] == [
        {"steps": 600, "mean": 40.0, "half_interval_95": None},
        {"steps": 1200, "mean": 80.0, "half_interval_95": None},
    ]


def test_the_command_is_told_without_the_folders_of_one_machine():
    command = "tokenpacker probe --weights '/my files/craft.pth' --tokens 36 --output=runs/a --jobs 2 --steps 400"
    text = Report(rows("token-packer", [0.5], command=command)).to_markdown()
    assert "\n`tokenpacker probe --tokens 36 --steps 400`: letters, craft, 1 runs" in text


def test_runs_of_several_commands_are_not_told_as_those_of_the_last():
    commands = {100: "a --jobs 1", 200: "a", 400: "b"}
    every = [row for steps, command in commands.items() for row in rows("mlp", [0.5], steps=steps, command=command)]
    text = Report(every).to_markdown()
    assert "\n2 commands, which results.jsonl has with each run: letters, craft, 3 runs" in text


def test_the_report_is_written_again_into_a_document(tmp_path):
    every = [*rows("token-packer", [0.5, 0.51, 0.52]), *rows("mlp", [0.9, 0.91, 0.92], tokens=576)]
    skipped = [{"projector": "pixel-shuffle", "tokens": 36, "reason": "why"}]
    write_report(tmp_path, every, skipped)
    table, whole = (tmp_path / "probe.md").read_text(), (tmp_path / "probe.json").read_text()
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in every))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- probe:begin -->\nold\n<!-- probe:end -->\nafter\n")
    main([str(tmp_path), str(page)])
    assert (table, whole) == ((tmp_path / "probe.md").read_text(), (tmp_path / "probe.json").read_text())
    assert page.read_text() == f"before\n<!-- probe:begin -->\n{table.rstrip()}\n<!-- probe:end -->\nafter\n"
    assert "pixel-shuffle at 36 tokens is left out: why." in table


NAMES = ("token-packer", "mlp", "average-pool", "ldp-v2", "token-packer:dense_query=true:window_position=true:other=2")
FIGURES = {
    "one": (NAMES[:1], (36,), (400,)),
    "usual": (NAMES[:4], (36, 9), (400,)),
    "many": (NAMES, (144, 64, 36, 16, 9, 4), (400, 1200, 4000)),
}


@pytest.mark.parametrize("drawn", ["tokens", "steps"])
@pytest.mark.parametrize(("names", "tokens", "steps"), FIGURES.values(), ids=FIGURES)
def test_a_figure_can_be_read_at_half_size_and_cuts_nothing(names, tokens, steps, drawn, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    keys = [
        (name, count, number) for name in names for number in steps for count in ((576,) if name == "mlp" else tokens)
    ]
    if drawn == "tokens":
        draw_over_tokens("Accuracy over tokens", {key: Mean(90.0 - key[1] % 7, 3.0) for key in keys}, None)
    else:
        curves = {key[:2]: [(step, Mean(90.0 - 100 / step, 3.0)) for step in (50, 200, 400)] for key in keys}
        draw_over_steps("Accuracy over training steps", curves, None)
    (figure,) = figures
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    assert min(text.get_fontsize() for text in texts) * figure.dpi / 72 / 2 >= 10  # pixels at half size
    boxes = [text.get_window_extent() for text in texts]
    edges = figure.bbox.padded(1)
    inside = [(edges.min <= box.min).all() and (box.max <= edges.max).all() for box in boxes]
    assert [text.get_text() for text, whole in zip(texts, inside, strict=True) if not whole] == []
    pairs = itertools.combinations(zip(texts, boxes, strict=True), 2)
    assert [(one.get_text(), other.get_text()) for (one, a), (other, b) in pairs if a.padded(-1).overlaps(b)] == []
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len(panels) == len(steps if drawn == "tokens" else tokens)
