"""The GPU benchmark's figures as a page: the text of docs/gpu.md, and below its last heading the tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu import ROOT
from tokenpacker.speed.tables import markdown, mebi, milliseconds, number

PAGE = ROOT / "docs" / "gpu.md"
HEADING = "## Results"
Found = dict[str, Any]


def write_page(report: dict[str, Any], file: Path) -> None:
    """Puts the tables below the heading that the page has for them."""
    text = PAGE.read_text(encoding="utf-8").partition(HEADING)[0]
    lines = [HEADING]
    machines = dict.fromkeys(map(_machine, filter(lambda found: "machine" in found, report["parts"].values())))
    lines += ["", *machines]
    for name, (title, tables) in PARTS.items():
        found = report["parts"].get(name, {"not_run": "not asked for"})
        lines += ["", f"### {title}", ""]
        if "not_run" in found:
            lines.append(f"Not run: {found['not_run']}.")
            continue
        lines += tables(found) if found["rows"] else []
        lines += [f"\n- {note}" for note in found["notes"]]
    file.write_text(text + "\n".join(lines).replace("\n\n\n", "\n\n") + "\n", encoding="utf-8")


def _machine(found: Found) -> str:
    machine = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    sizes = "; tiny sizes, no figures" if found["small"] else ""
    return f"{machine.get('gpu') or machine['processor']}, {machine['cores']} processor cores; {versions}{sizes}."


def _tests(found: Found) -> list[str]:
    row = found["rows"][0]
    lines = [f"{row['passed']} passed, {len(row['failed'])} failed, {len(row['skipped'])} skipped."]
    for kind in ("failed", "skipped"):
        lines += [f"\n- {kind}: `{name}`: {reason}" for name, reason in row[kind].items()]
    return lines


def _projector(found: Found) -> Iterator[str]:
    """One line for each batch, scale factor and direction; a mode has both times and their ratio."""
    merged: dict[tuple, Found] = {}
    for row in found["rows"]:
        key = row["batch"], row["scale_factor"], row["backward"]
        merged.setdefault(key, {}).update(row["modes"])
    modes = list(dict.fromkeys(mode for found in merged.values() for mode in found))
    header = ["batch", "s", "pass", *modes, "peak MiB, plain"]
    rows = []
    for (batch, scale, backward), of in sorted(merged.items()):
        cells = [str(batch), str(scale), "forward + backward" if backward else "forward"]
        cells += [_side_by_side(of[mode]) if mode in of else "-" for mode in modes]
        peak = of.get("plain", {}).get("peak_mib")
        cells.append(f"{peak['straightforward']:,.0f} / {peak['package']:,.0f}" if peak else "-")
        rows.append(cells)
    yield from markdown(header, rows)
    yield from ("", "Milliseconds of the straightforward module / of the package, and how many times faster this is.")


def _side_by_side(mode: Found) -> str:
    times = (milliseconds(statistics.median(times["device_ms"])) for times in mode["times"].values())
    return f"{' / '.join(times)} ({mode['speedup']:.2f} x)"


def _model(found: Found) -> Iterator[str]:
    header = ["image", "projector", "image tokens", "vision", "projector, ms", "first token", "per token"]
    header += ["KV cache MiB", "peak MiB", "first token by theory", "by clock"]
    rows = []
    for report in found["rows"]:
        for row in report["rows"]:
            counted, times, speedup = row["counted"], row["milliseconds"], row["speedup_of_first_token"]
            scale = "" if row["scale_factor"] is None else f", s = {row['scale_factor']}"
            rows.append(
                [
                    f"tiles: {counted['tiles']}",
                    row["projector"] + scale,
                    number(counted["image_tokens"]),
                    *(milliseconds(times[part]["median"]) for part in ("vision", "projector", "first_token")),
                    milliseconds(times["per_output_token"]["median"]),
                    mebi(counted["full_cache_bytes"]),
                    mebi(counted["peak_bytes"]),
                    f"{speedup['theory']:.2f} x",
                    f"{speedup['clock']:.2f} x",
                ]
            )
    yield from markdown(header, rows)
    yield from ("", "Medians in milliseconds, batch 1; ratios against mlp. Weights are in the peak.")


def _training(found: Found) -> Iterator[str]:
    header = ["recipe", "rows x tokens", "measured GiB", "estimated GiB", "step, s"]
    for row in found["rows"]:
        cells = [row["recipe"], f"{row['rows']} x {row['row_tokens']}", f"{row['measured_gib']:.2f}"]
        cells += [f"{row['estimated_gib']['total']:.2f}", f"{row['step_s'][-1]:.2f}"]
        yield from markdown(header, [cells])
        kinds = ", ".join(f"{kind} {gib:.2f}" for kind, gib in row["estimated_gib"].items() if kind != "total")
        yield from ("", f"Estimated: {kinds}.")


def _fsdp2(found: Found) -> list[str]:
    rows = [
        [
            row["what"],
            ", ".join(f"{loss:.4f}" for loss in row["losses"]),
            f"{row['seconds']:.1f}",
            "-" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}",
        ]
        for row in found["rows"]
    ]
    return markdown(["model", "losses", "seconds", "peak GiB"], rows)


def _four_bit(found: Found) -> list[str]:
    rows = [
        [row["weights"], f"{row['weights_mib']:,.0f}", f"{row['planned_mib']:,.0f}", f"{row['load_s']:.1f}"]
        for row in found["rows"]
    ]
    return markdown(["weights", "MiB", "planned MiB", "loaded in s"], rows)


PARTS = {
    "tests": ("Tests that are marked for a GPU", _tests),
    "projector": ("Projector in bfloat16 against a straightforward module", _projector),
    "model": ("CLIP-L/336, projector and a 7B language model", _model),
    "training": ("A LoRA step of instruct-7b", _training),
    "fsdp2": ("FSDP2 on one device", _fsdp2),
    "four-bit": ("Loading in four bits", _four_bit),
}
