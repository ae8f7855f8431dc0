"""A task for lmms-eval without network: signs of the fine-print scenes in Parquet, with questions and exact answers."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tokenpacker.scenes import FinePrint, Sample

SCORING = """
def score(doc, results):
    return {"right": float(results[0].strip().lower() == doc["answer"].lower())}
"""
GENERATION = """
task: signs
output_type: generate_until
generation_kwargs: {max_new_tokens: 8, temperature: 0, do_sample: false}
process_results: !function scoring.score
metric_list: [{metric: right, aggregation: mean, higher_is_better: true}]
"""
CHOICE = """
task: signs_choice
output_type: multiple_choice
doc_to_choice: ["yes", "no", "zebra"]
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def write_tasks(folder: Path, samples: list[Sample]) -> None:
    """Tasks `signs`, all questions, and `signs_choice`, those that are answered yes or no."""
    import datasets

    rows = [
        {"image": {"bytes": png(sample.image), "path": None}, "question": question.text, "answer": question.answer}
        for sample in samples
        for question in sample.questions
    ]
    kinds = {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    yes_or_no = [row for row in rows if row["answer"] in ("yes", "no")]
    (folder / "scoring.py").write_text(SCORING)
    for name, text, kept in (("signs", GENERATION, rows), ("signs_choice", CHOICE, yes_or_no)):
        table = folder / f"{name}.parquet"
        datasets.Dataset.from_list(kept, features=datasets.Features(kinds)).to_parquet(table)
        columns = "doc_to_visual: image\ndoc_to_text: question\ndoc_to_target: answer\ntest_split: test\n"
        source = f"dataset_path: parquet\ndataset_kwargs: {{data_files: {{test: {json.dumps(str(table))}}}}}\n"
        (folder / f"{name}.yaml").write_text(text + columns + source)


def png(picture: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def few_signs(number: int = 5) -> list[Sample]:
    return [FinePrint("test")[index] for index in range(number)]


def lmms_eval(folder: Path, out: Path, *options: str, processes: int = 1) -> dict[str, Any]:
    """Runs lmms-eval's command line in one process or several; what it wrote into `out`, samples included."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    settings = {
        "HF_HOME": str(out / "hub"),
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *launch, "-m", "lmms_eval", "--model", "tokenpacker", "--include_path", str(folder)]
    run = subprocess.run(
        [*command, "--output_path", str(out), "--log_samples", "--verbosity", "DEBUG", *options],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    (results,) = out.rglob("*_results.json")
    (samples,) = out.rglob("*_samples_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    return {
        "results": json.loads(results.read_text())["results"],
        "samples": sorted(lines, key=lambda it: it["doc_id"]),
    }
