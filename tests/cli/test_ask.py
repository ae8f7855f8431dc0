from __future__ import annotations

import io
import json
import struct
import zlib

import pytest
import torch
from PIL import Image

from tokenpacker.cli.conversation import Conversation


@pytest.fixture
def ask(tiny_model_dir):
    """Arguments of `ask` with the tiny model and a short answer."""
    return ("ask", "--model", tiny_model_dir, "--max-new-tokens", 6)


def test_the_answer_is_what_generate_gives_and_its_cost_is_told(
    run, run_json, ask, picture, tiny_model, tiny_processor
):
    content = [{"type": "image"}, {"type": "text", "text": "what?"}]
    prompt = tiny_processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = tiny_processor(images=Image.open(picture), text=prompt, return_tensors="pt")
    with torch.inference_mode():
        output = tiny_model.generate(**inputs, max_new_tokens=6, do_sample=False)
    prompt_tokens = inputs["input_ids"].shape[1]
    expected = tiny_processor.tokenizer.decode(output[0, prompt_tokens:], skip_special_tokens=True)
    answer = run_json(*ask, picture, "what?")
    assert answer["answer"] == expected.lstrip()
    assert answer["prompt_tokens"] == prompt_tokens
    assert answer["new_tokens"] == output.shape[1] - prompt_tokens
    assert 0 < answer["first_token_ms"] <= answer["total_ms"]

    result = run(*ask, picture, "what?")
    assert result.stdout == expected.lstrip() + "\n"
    grid = tiny_processor.image_layout((60, 90))
    full = grid.tile_grid.num_tiles * (8 * 8 + 1)
    assert f"{grid.num_tokens} image tokens instead of {full} at one per patch" in result.stderr
    assert "first token after" in result.stderr


def test_a_larger_scale_factor_and_a_budget_cost_less(run_json, ask, picture):
    whole = run_json(*ask, picture, "what?")["image_tokens"]
    packed = run_json(*ask, picture, "what?", "--scale-factor", 4)["image_tokens"]
    bounded = run_json(*ask, picture, "what?", "--max-image-tokens", 60)["image_tokens"]
    assert packed < whole
    assert bounded <= 60 < whole


def test_several_images_stand_before_the_question_or_where_it_says(run_json, ask, picture):
    before = run_json(*ask, picture, picture, "what changed?")
    marked = run_json(*ask, picture, picture, "<image> or <image>?")
    assert before["image_tokens"] == marked["image_tokens"] == 2 * run_json(*ask, picture, "what?")["image_tokens"]


def saved(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def huge_png() -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + b"\0\0\0\0IDAT"


GREY = Image.linear_gradient("L").resize((40, 30))
NOISE = Image.effect_noise((40, 30), 50)
ROTATED = Image.Exif()
ROTATED[0x0112] = 6
USABLE = {
    "cmyk.jpg": saved(GREY.convert("CMYK"), "JPEG"),
    "rgba.png": saved(GREY.convert("RGBA"), "PNG"),
    "sixteen-bit.png": saved(GREY.convert("I;16"), "PNG"),
    "palette.png": saved(GREY.convert("P"), "PNG", transparency=0),
    "rotated.jpg": saved(GREY, "JPEG", exif=ROTATED),
    "thin.png": saved(Image.new("RGB", (5000, 1)), "PNG"),
}
UNUSABLE = {
    "truncated.png": (saved(NOISE, "PNG")[:500], "cannot be decoded"),
    "zero-byte.png": (b"", "is empty (0 bytes); the download or copy failed, fetch it again"),
    "text.png": (b"hello", "is not an image that Pillow can read; give a PNG, JPEG, WebP, GIF or TIFF file"),
    "huge.png": (huge_png(), "has more than the 178,956,970 pixels allowed; shrink it first"),
}


@pytest.mark.parametrize("name", USABLE)
def test_unusual_pictures_get_an_answer(run_json, ask, tmp_path, name):
    (tmp_path / name).write_bytes(USABLE[name])
    assert run_json(*ask, tmp_path / name, "what?")["image_tokens"] > 0


def test_an_animation_is_answered_for_its_first_frame_and_this_is_said(run, ask, tmp_path):
    path = tmp_path / "moving.gif"
    GREY.save(path, save_all=True, append_images=[GREY.rotate(90)])
    result = run(*ask, path, "what?", "--json")
    assert json.loads(result.stdout)["image_tokens"] > 0
    assert f"note: {path} holds several frames; only the first is used" in result.stderr.splitlines()


@pytest.mark.parametrize("name", UNUSABLE)
def test_pictures_that_cannot_be_used_are_named_with_a_remedy(one_line_error, ask, tmp_path, name):
    content, message = UNUSABLE[name]
    (tmp_path / name).write_bytes(content)
    said = one_line_error(*ask, tmp_path / name, "what?")
    assert said.startswith(f"{tmp_path / name} {message}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scale-factor", "0"), "--scale-factor 0 must be at least 1, or auto"),
        (("--scale-factor", "99"), "scale_factor=99 exceeds patch_grid=8x8; use at most 8"),
        (("--max-image-tokens", "16"), "max_image_tokens=16 is too small: one tile costs 17 tokens"),
    ],
)
def test_budgets_and_scale_factors_that_cannot_be(one_line_error, ask, picture, arguments, message):
    assert one_line_error(*ask, picture, "what?", *arguments).startswith(message)


def test_an_mlp_projector_has_no_scale_factor(one_line_error, make_tiny_model, tiny_processor, picture, tmp_path):
    from tokenpacker.hf import TokenPackerProcessor

    model = make_tiny_model(projector_config={"name": "mlp"})
    model.save_pretrained(tmp_path)
    TokenPackerProcessor.from_config(model.config, tiny_processor.tokenizer).save_pretrained(tmp_path)
    message = one_line_error("ask", picture, "what?", "--model", tmp_path, "--scale-factor", 2)
    assert message == "scale_factor=2 but the mlp projector keeps every token; use 1 or leave it out"


def test_more_markers_than_images_are_refused(one_line_error, ask, picture):
    assert "2 markers, 1 images" in one_line_error(*ask, picture, "<image> <image> what?")


def test_a_question_in_the_wrong_place_is_told(one_line_error, ask, picture):
    message = one_line_error(*ask, "what?", picture)
    assert message == f"the last argument, {picture}, is a file; write the images first and then the question"


def test_an_image_without_a_question_is_told(one_line_error, ask, picture):
    assert one_line_error(*ask, picture) == f"{picture} has no question; write it behind the image, in quotes"


def test_a_prompt_that_the_model_cannot_hold_is_refused(one_line_error, ask, picture):
    message = one_line_error(*ask, *[picture] * 40, "what?")
    assert "the model reads fewer than 4096; use fewer images" in message


def test_a_mistake_with_json_is_an_object_too(run, ask):
    result = run(*ask, "no.png", "what?", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout) == {"error": "no.png does not exist; check the path"}
    assert result.stderr == "error: no.png does not exist; check the path\n"


@pytest.fixture
def region_inputs(monkeypatch):
    """What the model is given of regions, call by call; a tiny model's words would not tell."""
    calls = []
    generate = Conversation._generate

    def spy(talk, inputs, streamer):
        calls.append((inputs["region_cells"], inputs["region_first_tile"].tolist()))
        generate(talk, inputs, streamer)

    monkeypatch.setattr(Conversation, "_generate", spy)
    return calls


def cells_alone(processor, picture, *regions):
    """(R, P, L), each region's weights as the processor gives them for the region by itself."""
    prompt = "<image><mask>"
    each = [processor(Image.open(picture), prompt, region_masks=[[one]], return_tensors="pt") for one in regions]
    return torch.cat([inputs["region_cells"] for inputs in each])


def test_regions_are_given_as_files_boxes_and_polygons_in_any_order(
    run_json, region_model_dir, region_model, region_inputs, picture, tmp_path
):
    mask = Image.new("L", (90, 60))
    mask.paste(255, (40, 20, 70, 50))
    mask.save(tmp_path / "mask.png")
    given = ("--polygon", "3,3,30,4,20,25", "--mask", tmp_path / "mask.png", "--box", "0,0,20,10")
    question = "is <mask> between <mask> and <mask>?"
    answer = run_json("ask", "--model", region_model_dir, "--max-new-tokens", 6, picture, question, *given)
    assert answer["regions"] == [{"image": 1, "region": str(form)} for form in given[1::2]]
    expected = cells_alone(region_model[1], picture, [[3, 3, 30, 4, 20, 25]], mask, (0, 0, 20, 10))
    assert torch.equal(region_inputs[0][0], expected)


def test_the_first_region_is_the_first_mask_whatever_image_it_is_in(
    run_json, region_model_dir, region_model, region_inputs, picture
):
    given = ("--box", "2:3,3,30,30", "--box", "1:40,20,70,50")
    question = "is <mask> like <mask>?"
    answer = run_json("ask", "--model", region_model_dir, "--max-new-tokens", 6, picture, picture, question, *given)
    assert answer["regions"] == [{"image": 2, "region": "3,3,30,30"}, {"image": 1, "region": "40,20,70,50"}]
    cells, first_tile = region_inputs[0]
    assert torch.equal(cells, cells_alone(region_model[1], picture, (3, 3, 30, 30), (40, 20, 70, 50)))
    assert first_tile == [region_model[1].image_layout((60, 90)).tile_grid.num_tiles, 0]


@pytest.mark.parametrize(
    ("question", "regions", "message"),
    [
        ("what is <mask>?", [], "the question needs as many <mask> markers as regions: 1 markers, 0 regions"),
        ("what?", ["0,0,9,9"], "0 markers, 1 regions; mark each with --mask, --box or --polygon"),
        ("what is <mask>?", ["no.png"], "region no.png does not exist; check the path, or give a mask's file, a box"),
        ("what is <mask>?", ["here"], "region here is no file, nor numbers; give a mask's file, a box"),
        ("what is <mask>?", ["1,2,3"], "region 1,2,3 has 3 numbers; give a mask's file, a box x0,y0,x1,y1"),
        ("what is <mask>?", ["2:0,0,9,9"], "region 2:0,0,9,9 is of image 2, but there are 1; number them from 1"),
        ("<mask>, <mask>?", ["9,9,20,20", "90,0,99,9"], "region 2 reaches from (90, 0) to (99, 9), outside of its"),
    ],
)
def test_regions_that_cannot_be_are_told(one_line_error, region_model_dir, picture, question, regions, message):
    given = [argument for region in regions for argument in ("--box", region)]
    assert message in one_line_error("ask", "--model", region_model_dir, picture, question, *given)


def test_a_model_without_regions_says_so(one_line_error, ask, picture):
    message = one_line_error(*ask, picture, "what is <mask>?", "--box", "0,0,9,9")
    assert message == "the model has not learned regions; choose one that has, such as --model tiny-regions"


def test_a_question_that_is_not_utf_8_is_refused_in_one_line(run, picture, tiny_model_dir):
    result = run("ask", picture, "a\udcff?", "--model", tiny_model_dir)
    assert result.stderr.startswith("error: 'a\\udcff?' has U+DCFF at character 2, which is half a character")
    assert result.stderr.count("\n") == 1
