"""A folder of images, and a function that reads annotations of a format into rows and rejects."""

from __future__ import annotations

import json

import pytest

from tokenpacker.data.annotations import write_rows
from tokenpacker.data.rows import read_row


@pytest.fixture
def images(tmp_path, image_of):
    """Writes pictures of 40 x 60: `images("000000000007.jpg")` gives the folder of all of them."""
    folder = tmp_path / "images"
    folder.mkdir()

    def write(*names):
        for seed, name in enumerate(names):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            image_of(40, 60, seed=seed).save(folder / name)
        return folder

    return write


@pytest.fixture
def converted(tmp_path, images):
    """Rows and rejects of annotations, which are written to a file first: `converted("coco", content)`.

    Every row is read again as training would read it.
    """

    def convert_content(format, content, *, name="annotations.json", **options):
        path = tmp_path / name
        if content is not None:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        output = tmp_path / "rows.jsonl"
        result = write_rows(format, path, images(), output, **options)
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        for row in rows:
            read_row(row, tmp_path / "images", "row")
        rejects = tmp_path / "rows.jsonl.rejects.jsonl"
        told = [json.loads(line) for line in rejects.read_text().splitlines()] if rejects.exists() else []
        assert result.rows == len(rows)
        assert sum(result.rejected.values()) == len(told)
        return rows, told

    return convert_content
