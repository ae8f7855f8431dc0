"""The demo: examples, pictures and a page that needs nothing but itself."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from browser import DESKTOP, PHONE, assert_accessible, assert_fits
from page_reader import PageReader
from tokenpacker.demo import __main__ as demo
from tokenpacker.demo.drawings import SHADE_ALPHA, grid_picture, shade_map
from tokenpacker.demo.examples import ask_example, draw_examples
from tokenpacker.evaluate import Task
from tokenpacker.scenes import FinePrint, Question, Sample
from tokenpacker.speed.question import Setting
from tokenpacker.visualize import PackedImage


@pytest.fixture(scope="module")
def settings(tiny_model, tiny_processor, make_tiny_model, tiny_tokenizer):
    """What the demo compares: one TokenPacker at two scale factors, and an MLP."""
    from tokenpacker.hf import TokenPackerProcessor

    mlp = make_tiny_model(projector_config={"name": "mlp"})
    return [
        Setting(label="TokenPacker, s = 2", model=tiny_model, processor=tiny_processor, scale_factor=2),
        Setting(label="TokenPacker, s = 4", model=tiny_model, processor=tiny_processor, scale_factor=4),
        Setting(label="MLP", model=mlp, processor=TokenPackerProcessor.from_config(mlp.config, tiny_tokenizer)),
    ]


@pytest.fixture(scope="module")
def samples(image_of):
    question = Question("what is <b>this</b>?", "4", "number")
    return [
        Sample(name=f"noise-{i}", image=image_of(40, 64, seed=i), questions=(question,), caption="") for i in range(6)
    ]


@pytest.fixture(scope="module")
def report(settings, samples, tmp_path_factory):
    """The page of a demo, and what it wrote to the console."""
    names = ("easy-vqa", "fine-print")
    tasks = {name: Task(name=name, description="noise", load=lambda: samples, max_new_tokens=2) for name in names}
    written = io.StringIO()
    output = tmp_path_factory.mktemp("demo") / "new folder" / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "find_task", tasks.__getitem__)
        patch.setattr(demo, "NUM_QUESTIONS", dict.fromkeys(names, 4))
        patch.setattr(demo, "NUM_TIMED_IMAGES", 4)
        demo.run_demo(settings, output, Console(file=written, width=200))
    return output, written.getvalue()


@pytest.mark.parametrize("window", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_can_be_read_on_every_screen(report, open_page, window, scheme):
    page = open_page(report[0], window, color_scheme=scheme)
    assert_fits(page)
    assert_accessible(page)
    sizes = "[...document.querySelectorAll('main *')].map(element => parseFloat(getComputedStyle(element).fontSize))"
    assert min(page.evaluate(sizes)) >= 16


def test_the_demo_writes_one_page_that_holds_everything(settings, report):
    output, written = report
    page = output.read_text(encoding="utf-8")
    reader = PageReader(page)
    assert reader.open_tags == []
    assert not {"script", "link", "iframe", "img"} & set(reader.tags)
    assert reader.references
    assert all(reference.startswith("data:image/png;base64,") for reference in reader.references)
    assert "http" not in re.sub(r"data:image/png;base64,[^\"]*", "", page)  # styles load nothing either
    assert "<b>this</b>" not in page  # texts are escaped
    assert page.count("<article") == sum(demo.NUM_EXAMPLES.values()) == 5
    for setting in settings:
        assert setting.label in page
        assert setting.label in written
    assert str(output) in written


def test_examples_are_drawn_by_seed_with_one_question_each():
    data = {"fine-print": [FinePrint("test")[index] for index in range(6)]}
    drawn = draw_examples(data, {"fine-print": 3}, seed=1)
    again = draw_examples(data, {"fine-print": 3}, seed=1)
    assert [(s.name, s.questions) for s in drawn] == [(s.name, s.questions) for s in again]
    assert [len(sample.questions) for sample in drawn] == [1, 1, 1]
    assert len({sample.name for sample in drawn}) == 3


def test_an_example_has_a_reply_and_its_tokens_for_each_setting(settings, samples):
    example = ask_example(settings, samples[0])
    assert example.layout == "40 × 64 pixels, 2 × 3 tiles and a thumbnail"
    assert [reply.num_image_tokens for reply in example.replies] == [7 * 17, 7 * 5, 7 * 65]


def test_the_grid_picture_has_a_line_on_every_border_of_tiles_and_tokens(tiny_processor, image_of):
    packed = PackedImage.plan(tiny_processor, image_of(32, 64), scale_factor=2)
    tokens, tiles = re.findall(r'd="([^"]*)"', grid_picture(packed))
    assert {float(x) for x in re.findall(r"M([\d.]+) 0\.00V", tokens)} == set(range(0, 65, 8))
    assert {float(x) for x in re.findall(r"M([\d.]+) 0\.00V", tiles)} == {0, 32, 64}
    assert {float(y) for y in re.findall(r"M0\.00 ([\d.]+)H", tokens)} == set(range(0, 33, 8))


def test_the_shade_leaves_the_strongest_patch_of_each_window_bright(tiny_processor, image_of):
    packed = PackedImage.plan(tiny_processor, image_of(32, 64), scale_factor=2)  # 1 x 2 tiles of 8 x 8 patches
    weights = np.zeros((3, 16, 4, 2, 2), np.float32)  # two tiles and the thumbnail, 16 tokens, 4 heads
    weights[0, :, :, 0, 1] = 1.0  # top right patch of each window of the first tile
    weights[1, :, :, 1, 0] = 1.0  # bottom left patch of each window of the second
    weights[2] = 0.25
    shade = shade_map(packed, weights)
    assert shade.shape == (8, 16)
    bright = shade == 0
    assert bright[0::2, 1:8:2].all()
    assert bright[1::2, 8::2].all()
    assert bright.sum() == 2 * 16
    assert (shade[~bright] == SHADE_ALPHA).all()


def test_the_shade_cuts_edge_windows_where_the_patches_end(tiny_processor, image_of):
    packed = PackedImage.plan(tiny_processor, image_of(32, 32), scale_factor=3)  # 8 patches in windows of 3
    weights = np.random.default_rng(0).random((1, 9, 4, 3, 3), np.float32)
    assert shade_map(packed, weights).shape == (8, 8)


def test_pictures_keep_the_image_unchanged(tiny_processor, image_of):
    image = image_of(20, 30)
    packed = PackedImage.plan(tiny_processor, image)
    uri = re.search(r'href="data:image/png;base64,([^"]*)"', grid_picture(packed)).group(1)
    assert Image.open(io.BytesIO(base64.b64decode(uri))).tobytes() == image.tobytes()


def test_a_model_that_does_not_exist_is_told_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        demo.main(["--model", str(tmp_path / "nothing here")])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert "nothing here does not exist" in error
    assert error.count("\n") == 1


def test_ctrl_c_ends_the_demo_with_a_line(monkeypatch, capsys):
    def interrupted(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "load_settings", interrupted)
    with pytest.raises(SystemExit) as end:
        demo.main([])
    assert end.value.code == 130
    assert capsys.readouterr().err == "stopped; no report was written: call it again to start anew\n"
