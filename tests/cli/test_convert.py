"""`tokenpacker convert` from the shell; what it converts is tested beside the library."""

from __future__ import annotations

import torch

from released_layout import load


def test_there_and_back(run, run_json, make_complete, tmp_path, picture):
    src = make_complete(shards=2)
    there = run("convert", src, tmp_path / "model", "--dtype", "bfloat16")
    assert there.exit_code == 0
    assert there.stdout.startswith(f"{tmp_path / 'model'}: 439 tensors, 0.00 GB, from a complete checkpoint")
    answer = run_json("ask", picture, "what?", "--model", tmp_path / "model", "--max-new-tokens", "2")
    assert answer["image_tokens"] % 5 == 0  # tiles of 4 tokens, each with a separator
    back = run_json("convert", tmp_path / "model", tmp_path / "back", "--to", "original", "--weights", "safetensors")
    assert (back["kind"], back["tensors"]) == ("complete", 437)
    stored = {name: tensor if "inv_freq" in name else tensor.bfloat16() for name, tensor in load(src).items()}
    assert all(torch.equal(tensor, stored[name]) for name, tensor in load(tmp_path / "back").items())


def test_stage_1_there_and_back(run_json, make_stage_1, base_folder, tmp_path):
    src = make_stage_1()
    assert run_json("convert", src, tmp_path / "model", "--base", base_folder)["kind"] == "stage-1"
    assert run_json("convert", tmp_path / "model", tmp_path / "back", "--to", "stage-1")["tensors"] == 23
    assert (tmp_path / "back" / "mm_projector.bin").is_file()


def test_a_limit_of_tiles_and_a_tokenizer_can_be_chosen(run_json, make_complete, tmp_path):
    run_json(
        "convert",
        make_complete(),
        tmp_path / "model",
        "--max-tiles",
        16,
        "--tokenizer-variant",
        "fast",
        "--max-shard-gb",
        0.001,
    )
    from tokenpacker.hf import TokenPackerProcessor

    processor = TokenPackerProcessor.from_pretrained(tmp_path / "model")
    assert processor.image_processor.max_tiles == 16
    assert processor.tokenizer.init_kwargs["llama_variant"] == "fast"
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1


def test_what_the_user_should_know_is_told_on_standard_error(run, make_complete, tmp_path):
    result = run("convert", make_complete(config={"mm_vision_tower": "/nowhere/clip"}), tmp_path / "model")
    assert result.stderr.startswith("note: the config of the vision tower /nowhere/clip is not on this machine")


def test_mistakes_are_told_in_one_line(one_line_error, make_complete, make_stage_1, tmp_path):
    src = make_complete()
    assert "--base" in one_line_error("convert", make_stage_1(), tmp_path / "model")
    assert "which is read; choose another folder" in one_line_error("convert", src, src)
    assert "exists already" in one_line_error("convert", src, make_complete())
    assert one_line_error("convert", src, tmp_path / "b", "--to", "original").endswith(
        "give the folder of a converted or trained TokenPacker model"
    )
    assert "--base has no meaning with --to original" in one_line_error(
        "convert", src, tmp_path / "b", "--to", "original", "--base", "x"
    )
    assert "has no adapter to keep" in one_line_error("convert", src, tmp_path / "b", "--keep-adapter")
    assert "has no revision 'v2'" in one_line_error("convert", src, tmp_path / "b", "--revision", "v2")
    assert "--weights has no meaning" in one_line_error("convert", src, tmp_path / "b", "--weights", "bin")
    (src / "pytorch_model.bin").write_bytes(b"PK")
    assert "cannot be read; it is damaged or cut off" in one_line_error("convert", src, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_half_a_region_model_cannot_be_converted(one_line_error, make_complete, tmp_path):
    src = make_complete(change=lambda tensors: tensors.update({"mask_extractor.feat_linear.bias": torch.zeros(32)}))
    assert "9 missing: mask_extractor.feat_linear.weight" in one_line_error("convert", src, tmp_path / "model")
