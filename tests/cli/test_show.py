from __future__ import annotations

import pytest
from PIL import Image


@pytest.fixture
def show(tiny_model_dir, picture):
    return ("show", picture, "--model", tiny_model_dir, "--out")


def test_the_page_is_written_and_named(run, show, tmp_path):
    page = tmp_path / "page.png"
    result = run(*show, page)
    assert result.stdout == f"{page}\n"
    assert Image.open(page).width > 1000


def test_the_attention_of_the_chosen_token_is_a_distribution_over_its_window(run_json, show, tmp_path, tiny_processor):
    told = run_json(*show, tmp_path / "page.png", "--token", 5, "--scale-factor", 4)
    assert told["token"] == 5
    assert [len(row) for row in told["attention"]] == [4] * 4
    assert sum(map(sum, told["attention"])) == pytest.approx(1, abs=1e-3)  # rounded to four digits
    assert told["tokens"] == tiny_processor.image_layout((60, 90), scale_factor=4).num_tokens


def test_without_a_choice_a_token_that_shows_the_picture_is_taken(run_json, show, tmp_path):
    told = run_json(*show, tmp_path / "page.webp")
    top, left, bottom, right = told["box"]
    assert 0 <= top < bottom <= 60
    assert 0 <= left < right <= 90


def test_the_default_token_is_none_of_a_blank_part(run_json, tiny_model_dir, tmp_path):
    image = Image.new("RGB", (90, 60), "white")
    image.paste("black", (70, 40, 74, 44))
    image.save(tmp_path / "sparse.png")
    for scale_factor in (2, 5):
        told = run_json(
            *("show", tmp_path / "sparse.png", "--model", tiny_model_dir, "--out", tmp_path / "page.png"),
            *("--scale-factor", scale_factor),
        )
        top, left, bottom, right = told["box"]
        assert top < 44
        assert bottom > 40
        assert left < 74
        assert right > 70


def test_the_attention_of_a_token_at_the_edge_is_that_of_the_patches_that_exist(run_json, show, tmp_path):
    told = run_json(*show, tmp_path / "page.png", "--token", 3, "--scale-factor", 5)
    assert [len(row) for row in told["attention"]] == [3] * 3  # 8 patches: 5 and 3
    assert sum(map(sum, told["attention"])) == pytest.approx(1, abs=1e-3)


def test_auto_says_which_tile_got_how_many_tokens_and_why(run_json, picture, tmp_path):
    told = run_json("show", picture, "--out", tmp_path / "page.png", "--scale-factor", "auto")  # of the carried model
    assert len(told["scale_factors"]) == len(told["reasons"]) == told["tiles"]
    assert sum((12 // factor) ** 2 + 1 for factor in told["scale_factors"]) == told["tokens"]
    assert all(reason.startswith("detail 0.") for reason in told["reasons"])
    assert Image.open(tmp_path / "page.png").width > 1300  # a panel more


def test_a_projector_without_attention_gets_a_page_without_it(run, make_tiny_model, tiny_processor, picture, tmp_path):
    from tokenpacker.hf import TokenPackerProcessor

    model = make_tiny_model(projector_config={"name": "mlp"})
    model.save_pretrained(tmp_path)
    TokenPackerProcessor.from_config(model.config, tiny_processor.tokenizer).save_pretrained(tmp_path)
    result = run("show", picture, "--model", tmp_path, "--out", tmp_path / "page.png")
    assert result.exit_code == 0
    assert "the mlp projector has no window attention" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{}/page.txt",), "--out {}/page.txt must end in .png, .jpg, .jpeg, .webp"),
        (("{}/no/page.png",), "--out {}/no/page.png: the folder {}/no does not exist; create it first"),
        (("{}/page.png", "--token", "16"), "token 16 is a separator and shows nothing; choose another, such as 15"),
        (("{}/page.png", "--token", "9999"), "token 9999 does not exist; the image has the tokens 0 to "),
        (("{}/page.png", "--token", "-1"), "token -1 does not exist; the image has the tokens 0 to "),
        (("{}/page.png", "--scale-factor", "9"), "scale_factor=9 exceeds patch_grid=8x8; use at most 8"),
    ],
)
def test_mistakes(one_line_error, show, tmp_path, arguments, message):
    told = one_line_error(*show, *(argument.replace("{}", str(tmp_path)) for argument in arguments))
    assert told.startswith(message.replace("{}", str(tmp_path)))
