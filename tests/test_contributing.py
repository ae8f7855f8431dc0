"""The worked changes of CONTRIBUTING.md work, and what it names is there."""

import re
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from test_house import MAX_FILES
from tokenpacker import VisionFeatures
from tokenpacker.data import records
from tokenpacker.projectors import base, build

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CODE = dict(re.findall(r"^`([^`]+)`, [^\n]*:\n\n```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL))
NAMED = set(re.findall(r"`((?:src|tests|docs)/[^`*]+|\w+/(?:\w+/)*|\w+\.py)`", PAGE))
NEW = set(re.findall(r"`([^`]+)`, new:", PAGE))


def run(path, monkeypatch):
    """The module that a block is."""
    module = types.ModuleType("worked_change")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(CODE[path], path, "exec"), module.__dict__)
    return module


def test_there_is_room_for_the_new_files():
    folders = Counter((ROOT / path).parent for path in NEW if path.startswith("src/"))
    assert folders
    for folder, new in folders.items():
        assert len(list(folder.glob("*.py"))) + new <= MAX_FILES


@pytest.mark.parametrize("name", sorted(NAMED - NEW))
def test_a_file_or_folder_that_is_named_is_there(name):
    places = (ROOT, ROOT / "src" / "tokenpacker", ROOT / "tests" / "projectors")
    assert any((place / name).exists() for place in places)


def test_the_projector_is_built_by_its_name(monkeypatch):
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    run("src/tokenpacker/projectors/max_pool.py", monkeypatch)
    projector = build({"name": "max-pool", "vision_dim": 3, "language_dim": 5})
    tokens = torch.randn(1, 16, 3)  # 4 x 4 patches
    packed = projector(VisionFeatures(tokens, tokens, (4, 4)))
    assert packed.shape == (1, projector.config.num_tokens((4, 4)), 5)
    torch.testing.assert_close(packed[0, 0], projector.proj(tokens[0, [0, 1, 4, 5]].amax(dim=0)))


def test_the_data_format_gives_records(tmp_path, monkeypatch):
    path = tmp_path / "rows.tsv"
    path.write_text("\ufeffsign.png\twhat color?\tred\nno answer\n")
    exec(CODE["src/tokenpacker/data/records.py"], vars(records), names := {})
    read = records.Records([names["_TabFile"](path, tmp_path)])
    assert [turn["value"] for turn in read[0].conversation] == ["<image>\nwhat color?", "red"]
    with pytest.raises(records.RecordError, match="the line has 1 fields") as caught:
        read[1]
    assert caught.value.source == f"{path}, line 2"
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"rows.tsv is no UTF-8 text"):
        names["_TabFile"](path, tmp_path)


def test_the_command_runs(monkeypatch):
    module = run("src/tokenpacker/cli/commands/grid.py", monkeypatch)
    app = typer.Typer()
    app.command()(module.grid)
    result = CliRunner().invoke(app, ["2000x3000", "--max-tiles", "6"])
    assert (result.exit_code, result.stdout) == (0, "2 x 3\n"), result.output
