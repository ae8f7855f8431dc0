"""The folder of a run: what it belongs to, the rows that are in it, and the files that are written at the end."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import shutil
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenpacker.evaluate.answer_rows import AnswerRow, Plan
from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.bench_tasks import Bench, draw
from tokenpacker.whole_files import only_writer, write_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 1
RUN, RESULTS, ANSWERS, SUBMISSIONS = "run.json", "results.json", "answers", "submissions"
OURS = (RESULTS, ANSWERS, SUBMISSIONS, "report.html", "curve.png", "curve.md", RUN)  # in the order of their removal
LIBRARIES = ("tokenpacker", "torch", "transformers")
WHERE = ("model", "versions", "machine")  # what run.json says beside what decides the answers
ANEW = "add --overwrite to start anew, or choose another folder"


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What decides the answers, beside tasks and plans.

    Args:
        model: name or folder, for reports.
        fingerprint: same for equal models.
        dtype: of the weights, as asked for.
        limit: questions of each task, drawn at random with `seed`; None asks all.
        skip_broken: leaves questions that cannot be asked, and second uses of an id, out of the numbers. Otherwise the
            former count as wrong.
    """

    model: str
    fingerprint: str
    dtype: str | None = None
    limit: int | None = None
    seed: int = 0
    skip_broken: bool = False

    def draw(self, bench: Bench) -> list[BenchQuestion]:
        """The questions of a task that are asked. Raises ValueError for a limit below 1, and if no question is left."""
        questions = bench.loaded.questions
        if self.skip_broken:
            questions = tuple(each for each in questions if not each.is_broken and "repeated" not in each.extra)
        return [questions[place] for place in draw(len(questions), self.limit, self.seed)]

    def describe(
        self, benches: Sequence[Bench], drawn: Sequence[Sequence[BenchQuestion]], plans: Sequence[Plan]
    ) -> dict[str, Any]:
        """The run as run.json has it, without versions and machine.

        Raises:
            ValueError: for two tasks, or two plans, of one name.
        """
        for kind, names in (("tasks", [bench.name for bench in benches]), ("plans", [plan.name for plan in plans])):
            same = [name.casefold() for name in names]  # most file systems of macOS and Windows take them for one
            if twice := [name for name in names if same.count(name.casefold()) > 1]:
                raise ValueError(f"two {kind} are named {twice[0]}; leave one out, or rename its file")
        tasks = [_describe(bench, questions) for bench, questions in zip(benches, drawn, strict=True)]
        return {
            "format": FORMAT,
            **asdict(self),
            "tasks": tasks,
            "plans": [{"name": plan.name, **asdict(plan)} for plan in plans],
        }


def _describe(bench: Bench, questions: Sequence[BenchQuestion]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for question in questions:
        prompt = "" if question.is_broken else bench.protocol.prompt(question)
        asked = (question.id, prompt, question.image_key, question.answers, question.extra.get("problem"))
        digest.update(repr(asked).encode("utf-8", "backslashreplace"))
    return {
        "name": bench.name,
        "protocol": bench.protocol.name,
        "metric": bench.metric.name,
        "data": bench.data,
        "split": bench.loaded.split,
        "source": bench.loaded.source,
        "questions": len(questions),
        "digest": digest.hexdigest(),
        "problems": [asdict(problem) for problem in bench.loaded.problems],
    }


class RunFolder:
    """The folder of a run.

    Args:
        run: as `RunSettings.describe` gives it.
    """

    def __init__(self, path: Path, run: dict[str, Any]):
        self.path, self.run = path, run

    def only_writer(self) -> contextlib.AbstractContextManager[None]:
        """Keeps other processes from writing here. Raises ValueError if one does, or nothing can be written."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is not a folder; choose another place for the results")
        self.path.mkdir(parents=True, exist_ok=True)
        return only_writer(self.path / RUN)

    def check(self, overwrite: bool) -> bool:
        """Whether the run begins here: the folder is empty, or `overwrite` replaces the run in it.

        Raises:
            ValueError: for a folder of something else, and without `overwrite` for one of another run.
        """
        found = sorted(path.name for path in self.path.iterdir() if not path.name.startswith("."))
        if found in ([], ["run.part"]):  # of a run that was killed when it began
            return True
        if RUN not in found:
            raise ValueError(f"{self.path} holds {found[0]}, and no results of evaluate; choose another folder")
        if overwrite:
            return True
        try:
            before = json.loads((self.path / RUN).read_bytes())
            if not isinstance(before, dict):
                raise ValueError("no JSON object")
        except (ValueError, RecursionError):
            raise ValueError(f"{self.path / RUN} is damaged; {ANEW}") from None
        if difference := _difference(before, self.run):
            raise ValueError(f"{self.path} was written with {difference}; {ANEW}")
        return False

    def begin(self, model: PreTrainedModel) -> None:
        """Empties the folder and writes run.json."""
        for name in OURS:
            place = self.path / name
            if place.is_dir():
                shutil.rmtree(place)
            place.unlink(missing_ok=True)
        versions = {"python": platform.python_version()}
        for library in LIBRARIES:
            with contextlib.suppress(PackageNotFoundError):  # a checkout that is not installed has no version
                versions[library] = version(library)
        machine = {"system": platform.platform(), "device": str(model.device), "dtype": str(model.dtype)}
        self.run |= {"versions": versions, "machine": machine}
        _write_json(self.path / RUN, self.run)

    def answers(self, task: str, plan: str) -> Path:
        """The file of the rows of a task at a plan; its folder is made."""
        path = self.path / ANSWERS / task / f"{plan}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def seconds(self) -> dict[tuple[str, str], float]:
        """What earlier calls took for each task and plan, as far as they came to their end."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            results = json.loads((self.path / RESULTS).read_bytes())["results"]
            return {(result["task"], result["plan"]): float(result["seconds"]) for result in results}
        return {}

    def write_results(self, results: Sequence[Mapping[str, Any]]) -> None:
        """Writes results.json."""
        run = json.loads((self.path / RUN).read_bytes())
        _write_json(self.path / RESULTS, {"run": run, "results": list(results)})

    def write_submission(
        self, bench: Bench, plan: Plan, questions: Sequence[BenchQuestion], answers: Mapping[str, str]
    ) -> Path | None:
        """Writes the file for the benchmark's server, if it has one. Raises ModuleNotFoundError without its library."""
        from tokenpacker.evaluate.submissions import write_submission

        name = f"{bench.name}-{plan.name}"
        return write_submission(bench.protocol.benchmark, self.path / SUBMISSIONS, questions, answers, name=name)

    def write_report(self) -> Path:
        """Writes the page."""
        from tokenpacker.evaluate.results.results_page import write_report

        return write_report(self.path)


def kept_rows(path: Path, asked: Container[str]) -> tuple[dict[str, AnswerRow], int]:
    """The rows that earlier calls have written, by the ids of their questions, and where they end, in bytes.

    What follows is a row that a killed run did not write to its end.

    Args:
        asked: the ids of all questions.

    Raises:
        ValueError: for a row that answers none of the questions, or one of them again.
    """
    rows: dict[str, AnswerRow] = {}
    end = 0
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                row = AnswerRow.from_dict(json.loads(line))
            except (ValueError, TypeError, RecursionError):
                raise ValueError(f"{path} is damaged: line {number} is no answer; {ANEW}") from None
            if row.id not in asked or row.id in rows:
                raise ValueError(f"{path} is damaged: line {number} answers no question that is open; {ANEW}")
            rows[row.id] = row
            end += len(line)
    return rows, end


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What of an earlier run differs, in words; empty if nothing does."""
    for name, value in now.items():
        if name in WHERE or before.get(name) == value:
            continue
        if name == "fingerprint":
            return f"another model, {before.get('model')}"
        if name not in ("tasks", "plans"):
            return f"{name}={before.get(name)}, not {value}"
        entries = before.get(name) or []
        names = [[entry["name"] for entry in listed] for listed in (entries, value)]
        if names[0] != names[1]:
            return f"the {name} {', '.join(names[0])}"
        changed = next((old, new) for old, new in zip(entries, value, strict=True) if old != new)
        key = next(key for key in changed[1] if changed[0].get(key) != changed[1][key])
        other = {"protocol": "protocol", "metric": "metric", "split": "split"}.get(key, "data")
        return f"another {other} of {changed[1]['name']}"
    return ""


def _write_json(path: Path, content: object) -> None:
    write_whole(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
