"""Weights beside their graphs: what models of more than 2 GB need, tried with all weights of the carried model."""

from __future__ import annotations

import numpy as np
import pytest

from tokenpacker.export.manifest import Manifest

pytest.importorskip("onnx_ir")


def moved(onnx_folder, target, **options):
    """The vision encoders in `target`, their weights moved beside them, and the data files that each reads."""
    import onnx_ir

    from tokenpacker.export.onnx_files import SharedWeights

    shared = None
    read = []
    for file in (entry["file"] for entry in Manifest.read(onnx_folder).vision_encoders):
        program, path = onnx_ir.load(onnx_folder / file), target / file.rpartition("/")[2]
        shared = shared or SharedWeights(path, **options)
        read.append(shared.move(program))
        onnx_ir.save(program, path)
    return read


def features(path, tiles):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"pixel_values": tiles})[0]


def test_weights_that_scale_factors_share_are_stored_once(onnx_folder, tmp_path):
    read = moved(onnx_folder, tmp_path)
    assert read == [["vision_encoder.onnx_data"]] * 3
    stored = (tmp_path / "vision_encoder.onnx_data").stat().st_size
    alone = (onnx_folder / "onnx" / "vision_encoder.onnx").stat().st_size
    assert stored < 1.1 * alone
    tiles = np.random.default_rng(0).normal(size=(2, 3, 96, 96)).astype(np.float32)
    for name in ("vision_encoder.onnx", "vision_encoder_s3.onnx", "vision_encoder_s4.onnx"):
        assert (tmp_path / name).stat().st_size < 0.1 * alone
        np.testing.assert_array_equal(features(tmp_path / name, tiles), features(onnx_folder / "onnx" / name, tiles))


def test_large_weights_go_to_several_files_as_transformers_js_numbers_them(onnx_folder, tmp_path):
    read = moved(onnx_folder, tmp_path, chunk_bytes=1_500_000)
    names = [f"vision_encoder.onnx_data{end}" for end in ("", "_1", "_2")]
    assert read[0] == names
    assert all((tmp_path / name).stat().st_size <= 1_500_000 for name in names)
    tiles = np.zeros((1, 3, 96, 96), np.float32)
    expected = features(onnx_folder / "onnx" / "vision_encoder_s3.onnx", tiles)
    np.testing.assert_array_equal(features(tmp_path / "vision_encoder_s3.onnx", tiles), expected)
