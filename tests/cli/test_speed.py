"""`tokenpacker speed`: what it prints and what it refuses; never how large a time is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tokenpacker.speed.flops import FORMULA

QUICK = ("--rounds", 1, "--batch-sizes", "1", "--output-tokens", 2, "--device", "cpu")
LLAMA = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}


def test_a_measurement_says_what_ran_on_what(run_json, tiny_model_dir):
    report = run_json("speed", "--model", tiny_model_dir, *QUICK, "--image", "64x96")
    assert [row["projector"] for row in report["rows"]] == ["token-packer", "average-pool", "mlp"]
    assert report["formula"] == FORMULA
    assert (report["dtype"], report["random_weights"]) == ("float32", False)
    assert (report["attention"]["language_model"], report["machine"]["device"]) == ("sdpa", "cpu")
    assert {"torch", "transformers", "tokenpacker"} <= set(report["machine"]["versions"])
    assert (report["protocol"]["output_lengths"], report["protocol"]["image_size"]) == ([1, 2], [64, 96])
    for row in report["rows"]:
        parts = ["vision", "projector", "prefill", "first_token", "per_output_token", "total"]
        assert list(row["milliseconds"]) == parts
        assert all(set(times) == {"median", "p95"} for times in row["milliseconds"].values())
        folded = row["folded_projector_milliseconds"]
        assert folded is None or set(folded) == {"median", "p95"}
        assert row["counted"]["full_cache_bytes"] > row["counted"]["cache_bytes"] > 0
        assert set(row["speedup_of_first_token"]) == {"theory", "clock"}


def test_what_is_measured_is_what_is_planned(run_json, tiny_model_dir):
    options = ("--model", tiny_model_dir, "--image", "64x96", "--scale-factor", 4, "--output-tokens", 2)
    measured = run_json("speed", *options, "--rounds", 1, "--batch-sizes", "1")["rows"]
    planned = [
        row for row in run_json("speed", "--plan", *options, "--dtype", "float32")["rows"] if row["mode"] == "slice"
    ]
    assert len(measured) == len(planned) == 3
    for real, theory in zip(measured, planned, strict=True):
        assert real["projector"] == theory["projector"]
        assert real["flops"] == theory["flops"]
        counts = ("tiles", "tokens_per_tile", "image_tokens", "prompt_tokens", "cache_bytes", "full_cache_bytes")
        assert {name: real["counted"][name] for name in counts} == {name: theory[name] for name in counts}


def test_the_table_has_a_row_for_each_projector_and_batch_size(run, tiny_model_dir):
    result = run("speed", "--model", tiny_model_dir, "--rounds", 1, "--output-tokens", 2, "--projectors", "ldp-v2,mlp")
    table = [line.split("|")[1:-1] for line in result.stdout.splitlines() if line.startswith("|")]
    assert [[cell.strip() for cell in row[:2]] for row in table[2:]] == [
        [size, name] for size in ("1", "8") for name in ("ldp-v2", "mlp", "average-pool")
    ]
    assert "random" not in result.stdout.splitlines()[0]
    assert "2 tokens" in result.stdout


def test_a_plan_of_a_named_size_needs_no_model(run, run_json):
    shown = run("speed", "--plan", "--model", "7b", "--image", "2000x3000").stdout
    assert shown.startswith(
        "7b, an image of 2000 x 3000, 64 text tokens; TFLOP counted from the modules, `2n(2d^2+2d*d_kv+3dm)+4n^2d`"
    )
    assert "| 2 x 3    | token-packer |   2 |     7 |        1,015 |" in shown
    plan = run_json("speed", "--plan", "--shapes", "13b", "--scale-factor", 3)
    assert [row["image_tokens"] for row in plan["rows"] if row["mode"] == "one-tile"] == [64, 64, 576]


def test_the_plan_in_the_documentation_is_what_the_command_prints(run):
    page = (Path(__file__).resolve().parents[2] / "docs" / "speed.md").read_text(encoding="utf-8")
    shown = run("speed", "--plan", "--model", "7b", "--image", "2000x3000").stdout
    table = [line for line in shown.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 14
    assert "\n".join(table) in page


def test_a_plan_reads_no_weights(run_json, tiny_model_dir, tmp_path):
    for name in ("config.json", "processor_config.json"):
        (tmp_path / name).write_bytes((tiny_model_dir / name).read_bytes())
    plan = run_json("speed", "--plan", "--model", tmp_path)
    assert plan["own_mode"] == "slice"
    assert plan["image"] == [32, 32]


def test_a_checkpoint_in_the_original_layout_can_be_planned(run_json, tmp_path):
    config = {
        "model_type": "llava",
        "vocab_size": 32000,
        "image_aspect_ratio": "slice",
        "patch_num": 16,
        "scale_factor": 3,
    }
    (tmp_path / "config.json").write_text(json.dumps(config | LLAMA))
    plan = run_json("speed", "--plan", "--model", tmp_path, "--image", "1344x1344", "--scale-factor", 3)
    row = next(row for row in plan["rows"] if row["mode"] == "slice")
    assert (row["projector"], row["grid"], row["tiles"], row["image_tokens"]) == ("token-packer", [4, 4], 17, 17 * 65)
    assert row["flops"]["vision"] == 17 * run_json("speed", "--plan", "--shapes", "13b")["rows"][0]["flops"]["vision"]


def test_shapes_may_be_a_file(run_json, tiny_model_dir, tmp_path):
    path = tmp_path / "mine.json"
    path.write_bytes((tiny_model_dir / "config.json").read_bytes())
    report = run_json("speed", "--shapes", path, *QUICK)
    assert (report["model"], report["random_weights"]) == ("mine", True)
    assert report["rows"][0]["counted"]["image_tokens"] == 16  # in one piece, as no image was named


def test_the_size_may_be_that_of_a_file(run_json, picture):
    assert run_json("speed", "--plan", "--shapes", "small", "--image", picture)["image"] == [60, 90]


def test_a_model_that_takes_images_whole_says_so(run, make_tiny_model, tiny_tokenizer, tmp_path):
    from tokenpacker.hf import TokenPackerProcessor

    model = make_tiny_model()
    model.save_pretrained(tmp_path)
    TokenPackerProcessor.from_config(model.config, tiny_tokenizer, image_mode="pad").save_pretrained(tmp_path)
    result = run("speed", "--model", tmp_path, *QUICK, "--image", "64x96", "--json")
    assert "takes an image in one piece, whatever its size" in result.stderr
    assert json.loads(result.stdout)["rows"][0]["counted"]["tiles"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "x", "--shapes", "7b"), "--model and --shapes exclude each other; leave one out"),
        (("--shapes", "70b"), "shapes '70b' are unknown; use 7b, 13b, small, or a JSON file of a model's config"),
        (("--shapes", "none.json"), "shapes none.json do not exist as a file; use 7b, 13b, small, or a JSON file"),
        (
            ("--plan", "--model", "no/such folder"),
            "model no/such folder does not exist; give a model's folder or hub id",
        ),
        (("--image", "large"), "--image: 'large' is no size; write HEIGHTxWIDTH in pixels"),
        (("--batch-sizes", "1,zero"), "--batch-sizes '1,zero' must be whole numbers of at least 1 with commas between"),
        (("--shapes", "small", "--device", "auto"), "--device auto spreads a stored model; random weights need"),
        (("--shapes", "small", "--dtype", "4bit"), "--dtype 4bit quantizes a stored model; random weights take"),
        (("--plan", "--rounds", "3"), "--rounds has no part in --plan, which runs nothing; leave one of them out"),
        (("--projectors", "none"), "projector 'none' is unknown; use some of average-pool"),
        (("--scale-factor", "99"), "scale_factor=99 exceeds patch_grid=12x12; use at most 12"),
    ],
)
def test_mistakes(one_line_error, arguments, message):
    assert one_line_error("speed", *arguments).startswith(message)


def test_what_does_not_fit_is_said_before_it_is_tried(one_line_error):
    message = one_line_error("speed", "--model", "13b", "--batch-sizes", "100000")
    assert message.startswith("model 13b in ")
    assert message.endswith(
        "plan it with --plan, or take --batch-sizes 1, --dtype bfloat16, a smaller image, or a larger --device"
    )


def test_a_file_that_is_no_config_is_named(one_line_error, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text("{}")
    assert one_line_error("speed", "--plan", "--shapes", path).startswith(f"{path} has no vision_config; write")
    path.write_text('{"vision_config": {"num_hidden_layers": 0}, "text_config": {}}')
    assert one_line_error("speed", "--plan", "--shapes", path).startswith(f"{path} is no model's config (")


def test_a_folder_of_another_kind_of_model_is_named(one_line_error, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    message = one_line_error("speed", "--plan", "--model", tmp_path)
    assert message.startswith(f"model {tmp_path} is of the kind 'bert', not 'tokenpacker'; name another, or use 7b")
