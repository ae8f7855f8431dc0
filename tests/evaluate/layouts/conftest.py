"""A folder of made-up benchmark files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

PICTURES = (".jpg", ".png")


@pytest.fixture
def put(tmp_path):
    """Writes files below a folder and returns it: rows as JSONL, other values as JSON, text as it is, pictures."""

    def write(files):
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix in PICTURES or content is None:
                Image.new("RGB", (8, 4), "white").save(path, format="PNG")
            elif isinstance(content, str):
                path.write_text(content, encoding="utf-8")
            elif Path(name).suffix == ".jsonl" or "coco_pope" in name:
                path.write_text("".join(f"{json.dumps(row)}\n" for row in content), encoding="utf-8")
            else:
                path.write_text(json.dumps(content), encoding="utf-8")
        return tmp_path

    return write
