"""`export.json`: only what `Manifest.write` can have written is read."""

from __future__ import annotations

import hashlib
import json

import pytest

from tokenpacker.export import Manifest

GRAPHS = ("onnx/vision.onnx", "onnx/embed.onnx", "onnx/decoder.onnx")


@pytest.fixture
def folder(tmp_path):
    """An exported folder whose graphs are no graphs."""
    place = tmp_path / "export"
    (place / "onnx").mkdir(parents=True)
    files = {}
    for name in GRAPHS:
        (place / name).write_text(name)
        files[name] = {"bytes": len(name), "sha256": hashlib.sha256(name.encode()).hexdigest()}
    vision, embed, decoder = GRAPHS
    Manifest(
        tokenpacker="0.2.0",
        transformers="5.24.0",
        runtime="onnx",
        quantization=None,
        image_token_id=9,
        max_positions=None,
        vision_encoders=[{"scale_factor": 2, "file": vision}],
        embed_tokens=embed,
        decoder=decoder,
        cache={"layers": 2, "heads": 2, "head_dim": 8},
        files=files,
    ).write(place)
    return place


def refused(folder, text=None, **changes):
    """The message of `Manifest.read` for an `export.json` with other values."""
    path = folder / "export.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes) if text is None else text)
    with pytest.raises(ValueError, match=r"export the model anew$") as told:
        Manifest.read(folder)
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 700
    return str(told.value)


def test_what_was_written_is_read(folder):
    manifest = Manifest.read(folder)
    assert manifest.scale_factors == [2]
    assert (manifest.embed_tokens, manifest.decoder) == GRAPHS[1:]


@pytest.mark.parametrize("text", ["", "null", "[]", "7", '"onnx"', "{}", "[" * 100_000, '{"a":' * 100_000])
def test_what_is_no_manifest_is_told_as_damaged(folder, text):
    assert "export.json is damaged (" in refused(folder, text)


@pytest.mark.parametrize(
    "name",
    ["../decoder.onnx", "onnx/../../x", "..\\x", "onnx\\..\\..\\x", "/x", "C:\\x", "C:x", "\\\\host\\share\\x", ""],
)
def test_no_file_lies_outside_the_folder(folder, name):
    content = b"outside"
    (folder.parent / "decoder.onnx").write_bytes(content)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    files = json.loads((folder / "export.json").read_text())["files"]
    message = refused(folder, files=files | {name: entry}, decoder=name)
    assert f"files has {name!r} but must have paths within the folder, without .." in message


@pytest.mark.parametrize("name", ["../decoder.onnx", "onnx/other.onnx", "/etc/hostname", 7, None, ["x"], {"a": 1}])
def test_a_graph_that_is_not_among_the_files_is_refused(folder, name):
    (folder / "onnx" / "other.onnx").touch()
    rule = "must have one of the files under files"
    assert rule in refused(folder, decoder=name)
    assert rule in refused(folder, decoder=GRAPHS[2], embed_tokens=name)
    encoders = [{"scale_factor": 2, "file": name}]
    assert rule in refused(folder, embed_tokens=GRAPHS[1], vision_encoders=encoders)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("runtime", ["tflite", None, [], {}]),
        ("quantization", ["int4", 8, []]),
        ("tokenpacker", [None, 7]),
        ("dtype", [None, []]),
        ("image_token_id", ["9", -1, 1.5, True, None]),
        ("max_positions", ["9", 0, True, []]),
        ("cache", [None, [], {}, {"layers": 2, "heads": 2}, {"layers": 2, "heads": 2, "head_dim": "8"}]),
        ("files", [None, [], "x"]),
        ("vision_encoders", [None, [], {}, "x", ["x"], [None], [{}], [{"file": GRAPHS[0]}]]),
        ("vision_encoders", [[{"scale_factor": bad, "file": GRAPHS[0]}] for bad in ("2", 0, True, [2])]),
    ],
)
def test_values_of_wrong_types_are_named(folder, key, values):
    for value in values:
        assert f"export.json is damaged ({key} has " in refused(folder, **{key: value}), value


@pytest.mark.parametrize(
    "entry", [None, 7, {}, {"bytes": 1}, {"bytes": "1", "sha256": "0" * 64}, {"bytes": 1, "sha256": "0" * 63}]
)
def test_a_file_without_size_and_digest_is_refused(folder, entry):
    assert "sha256, 64 hexadecimal digits" in refused(folder, files={GRAPHS[0]: entry})


def test_a_name_that_no_system_takes_is_missing(folder):
    files = json.loads((folder / "export.json").read_text())["files"]
    long = "x" * 400
    assert "is missing" in refused(folder, files=files | {long: files[GRAPHS[0]]})
    assert "must have paths within" in refused(folder, files=files | {"a\0b": files[GRAPHS[0]]})


def test_a_file_with_other_bytes_is_refused(folder):
    (folder / GRAPHS[2]).write_text(GRAPHS[2].upper())
    with pytest.raises(ValueError, match=r"decoder.onnx has another SHA-256 than export.json says; copy the folder"):
        Manifest.read(folder)
