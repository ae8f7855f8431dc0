"""A wrong argument is told before anything heavy is imported or loaded."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAM = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from tokenpacker.cli import app
told = []
for command in json.loads(sys.argv[1]):
    with redirect_stderr(io.StringIO()) as errors, redirect_stdout(errors):
        try:
            app(command)
        except SystemExit as end:
            code = end.code
    told.append([code, errors.getvalue(), sorted({"torch", "transformers", "datasets"} & set(sys.modules))])
print(json.dumps(told))
"""
IMAGE = "picture.png"
AT_ONCE = [  # and what is said; nothing of torch is imported for it
    (["ask", "what?"], "the question 'what?' has no image; write the image's path before it"),
    (["ask", IMAGE, ""], "the question is empty; write it behind the images, in quotes"),
    (["ask", IMAGE, "  "], "the question is empty"),
    (["ask", "no.png", "what?"], "no.png does not exist; check the path"),
    (["ask", IMAGE, "what?", "--scale-factor", "0"], "--scale-factor 0 must be at least 1, or auto"),
    (["ask", IMAGE, "what?", "--max-image-tokens", "0"], "--max-image-tokens 0 must be at least 1"),
    (["ask", IMAGE, "what?", "--model", "no such"], "model no such does not exist"),
    (["ask", IMAGE, "what?", "--device", "gpu"], "--device gpu is unknown; use one of cpu, cuda, mps, auto, or cuda:1"),
    (["ask", IMAGE, "what?", "--dtype", "int3"], "invalid value for '--dtype': 'int3' is not one of 'float32', "),
    (["ask", IMAGE, "what is <mask>?", "--box", "1,2,3"], "region 1,2,3 has 3 numbers"),
    (
        ["ask", IMAGE, "what is <mask>?", "--box", "0.1,0.1,0.5,0.5"],
        "region 0.1,0.1,0.5,0.5 has all coordinates between 0",
    ),
    (["chat", "--scale-factor", "0"], "--scale-factor 0 must be at least 1, or auto"),
    (["chat", "--model", "tinny"], "model tinny does not exist; did you mean tiny?"),
    (["count", "--size", "3x4", "--max-tiles", "0"], "--max-tiles 0 must be at least 1"),
    (["show", IMAGE, "--out", "page.doc"], "--out page.doc must end in .png"),
    (["show", "no.png", "--out", "page.png"], "no.png does not exist"),
    (
        ["show", IMAGE, "--out", "page.png", "--scale-factor", "0"],
        "--scale-factor 0 must be at least 1, or auto",
    ),
    (["evaluate", "--limit", "0"], "--limit 0 must be at least 1"),
    (["evaluate", "--device", "gpu"], "--device gpu is unknown"),
    (["speed", "--model", "tiny", "--shapes", "7b"], "--model and --shapes exclude each other"),
    (["speed", "--shapes", "70b"], "shapes '70b' are unknown"),
    (
        ["speed", "--shapes", "smal"],
        "shapes 'smal' are unknown; use 7b, 13b, small, or a JSON file of a model's config;",
    ),
    (["speed", "--model", "tinny"], "model tinny does not exist; did you mean tiny?"),
    (["speed", "--plan", "--model", "tinny"], "model tinny does not exist; did you mean tiny?"),
    (["speed", "--image", "large"], "--image: 'large' is no size"),
    (["speed", "--batch-sizes", "x"], "--batch-sizes 'x' must be whole numbers"),
    (["speed", "--plan", "--rounds", "3"], "--rounds has no part in --plan, which runs nothing; leave one of them out"),
    (["compare", "--seeds", "x"], "--seeds 'x' must be whole numbers"),
    (["compare", "--recipe", "tiny"], "--recipe tiny must be two names"),
    (["compare", "--foundation", "none"], "invalid value for '--foundation': "),
    (["convert", "no such", "out"], "model no such does not exist"),
    (["convert", "tiny", IMAGE], f"{IMAGE} exists already; choose another folder, or pass --overwrite"),
    (["convert", "tiny", "out", "--weights", "bin"], "--weights has no meaning with --to tokenpacker"),
    (["data", "check", "none.json"], "invalid value for 'DATA"),
    (["data", "check", IMAGE, "--model", "tinny"], "model tinny does not exist; did you mean tiny?"),
    (["data", "check", IMAGE, "--picture", "tokens.doc"], "--picture tokens.doc must end in .png"),
    (["data", "show", "none.json", "--out", "page.png"], "invalid value for 'DATA': "),
    (["data", "show", IMAGE, "--out", "page.doc"], "--out page.doc must end in .png"),
    (["data", "check", IMAGE, "--max-rejects", "2"], "--max-rejects 2.0 must lie between 0 and 1"),
    (["data", "regions", "cocoa"], "format 'cocoa' is unknown; use one of coco, refcoco, "),
    (["data", "regions", "FOO"], "format 'FOO' is unknown; use one of coco, refcoco, "),
    (
        ["train", "algin-7b"],
        "recipe 'algin-7b' is unknown; `tokenpacker train recipes` lists them; did you mean align-7b?",
    ),
    (["train", "nope"], "recipe 'nope' is unknown; `tokenpacker train recipes` lists them"),
    (["data", "regions", "coco"], "ANNOTATIONS, --images and --output are needed"),
    (["data", "regions", "coco", "none", "--images", ".", "--output", "o.jsonl"], "invalid value for 'ANNOTATIONS': "),
]
WITH_TORCH = [  # needs a projector's or a data set's arithmetic, but no transformers
    (["ask", IMAGE, "what?", "--scale-factor", "99"], "scale_factor=99 exceeds patch_grid=12x12; use at most 12"),
    (["ask", IMAGE, "what?", "--max-image-tokens", "9"], "max_image_tokens=9 is too small: one tile costs 37 tokens"),
    (["chat", "--scale-factor", "99"], "scale_factor=99 exceeds"),
    (["show", IMAGE, "--out", "page.png", "--scale-factor", "99"], "scale_factor=99 exceeds"),
    (["evaluate", "--tasks", "fine-prind"], "task 'fine-prind' is unknown; use a file that ends in .jsonl, or some of"),
    (["evaluate", "--scale-factor", "99"], "scale_factor=99 exceeds"),
    (["count", IMAGE, "--scale-factor", "99"], "scale_factor=99 exceeds"),
    (["speed", "--projectors", "tokenpacker"], "projector 'tokenpacker' is unknown; use some of average-pool"),
    (["compare", "--projectors", "tokenpacker:num_heads=2"], "projector 'tokenpacker' is unknown; use some of"),
]


@pytest.mark.parametrize(("cases", "allowed"), [(AT_ONCE, []), (WITH_TORCH, ["torch"])], ids=["at once", "with torch"])
def test_a_wrong_argument_is_told_before_anything_heavy_is_imported(tmp_path, image_of, cases, allowed):
    image_of(30, 40).save(tmp_path / IMAGE)
    commands = json.dumps([command for command, _ in cases])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, commands],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for (command, message), (code, said, imported) in zip(cases, json.loads(done.stdout), strict=True):
        assert said.startswith(f"error: {message}"), command
        assert (code, said.count("\n")) == (2, 1), command
        assert set(imported) <= set(allowed), command
