from __future__ import annotations

import copy

import pytest
import torch
from PIL import Image

from tokenpacker.cli.commands import chat as chat_module
from tokenpacker.cli.commands.chat import Session
from tokenpacker.cli.conversation import Conversation
from tokenpacker.visualize.conversation_page import LINE


@pytest.fixture
def conversation(tiny_model, tiny_processor) -> Conversation:
    return Conversation(tiny_model, tiny_processor, max_new_tokens=5)


@pytest.fixture
def chat(tiny_model_dir):
    return ("chat", "--model", tiny_model_dir, "--max-new-tokens", 5)


def test_a_piped_conversation_answers_each_line(run, chat, picture):
    result = run(*chat, input=f"/image {picture}\nwhat?\n\nand now?\n/quit\nnever asked\n")
    assert result.exit_code == 0
    assert result.stderr.count("first token after") == 2
    assert f"{picture}: 60 x 90, " in result.stderr


def test_history_and_images_stay_in_the_prompt(run_json, chat, picture):
    first, second = run_json(*chat, input=f"/image {picture}\nwhat?\nand now?\n")["turns"]
    assert second["image_tokens"] == first["image_tokens"] > 0
    assert second["prompt_tokens"] > first["prompt_tokens"]
    assert second["question"] == "and now?"


def test_clear_forgets_images_and_history(run_json, chat, picture):
    turns = run_json(*chat, input=f"what?\n/image {picture}\nwhat?\n/clear\nwhat?\n")["turns"]
    assert [turn["image_tokens"] > 0 for turn in turns] == [False, True, False]
    assert turns[2]["prompt_tokens"] == turns[0]["prompt_tokens"]


def test_a_mistake_is_told_and_the_conversation_goes_on(run, chat, picture):
    lines = f"/image no.png\n/image\n<image> what?\n/image {picture}\nwhat?\n"
    result = run(*chat, input=lines)
    assert result.exit_code == 2, "a script must see that lines failed"
    assert "error: no.png does not exist; check the path" in result.stderr
    assert "error: /image needs a path, for example /image photo.jpg" in result.stderr
    assert "1 markers, 0 images" in result.stderr
    assert result.stderr.count("first token after") == 1


def test_help_shows_the_commands_again(run, chat):
    result = run(*chat, input="/help\n")
    assert result.exit_code == 0
    assert result.stderr.count("/image PATH adds an image") == 2


def test_an_unknown_command_is_named_with_the_nearest_one(run, chat):
    result = run(*chat, input="/imge photo.jpg\n/xyzzy\n")
    assert result.exit_code == 2
    assert "error: /imge is no command; did you mean /image?" in result.stderr
    assert "error: /xyzzy is no command; /help lists the commands" in result.stderr
    assert result.stderr.count("/image PATH adds an image") == 1


def test_a_line_that_is_no_text_is_refused_and_the_next_ones_are_answered(conversation, capsys):
    session = Session(conversation, quiet=True)
    for line in ("what is caf\udce9?\n", "what?\n"):
        assert session.handle(line)
    assert "the line has U+DCE9 at character 12, which is half a character" in capsys.readouterr().err
    assert [turn.get("question") for turn in session.turns] == [None, "what?"]


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(conversation):
    heard: list[str] = []

    def stop(text: str) -> None:
        heard.append(text)
        if len(heard) == 1:
            raise KeyboardInterrupt

    answer = conversation.ask("a long story?", [], stop)
    assert answer.interrupted
    assert answer.text == "".join(heard)
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]


def test_ctrl_c_before_the_first_word_takes_the_question_back(conversation, image_of, monkeypatch):
    conversation.ask("first?", [], lambda _: None)
    history = list(conversation.messages)

    def stop(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(conversation, "_generate", stop)
    session = Session(conversation, quiet=True)
    session.waiting = [conversation.pack(image_of(30, 30))]
    assert session.handle("second?")
    assert conversation.messages == history
    assert len(session.waiting) == 1  # the image still waits for the next question


def test_ctrl_c_at_the_prompt_leaves_only_when_repeated(monkeypatch):
    typed = iter([KeyboardInterrupt, "a", KeyboardInterrupt, KeyboardInterrupt, "never read"])

    def type_line(_prompt: str) -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", type_line)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert list(chat_module._lines(quiet=False)) == ["a"]


def test_a_bug_is_not_hidden(conversation, monkeypatch):
    def broken(*_args: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(conversation, "_generate", broken)
    with pytest.raises(ZeroDivisionError):
        Session(conversation).handle("what?")


def test_regions_of_earlier_images_can_be_asked_for_again(region_model, image_of):
    """Marks take their regions in the order of the conversation, whatever image these are in."""
    model, processor = region_model
    talk = Conversation(model, processor, max_new_tokens=4)
    pictures = [image_of(32, 32, 1), image_of(40, 60, 2)]
    session = Session(talk, quiet=True)
    session.waiting = [talk.pack(picture) for picture in pictures]
    for line in ("/box 5,5,30,30", "what is <mask>?", "/box 1:0,0,9,9", "/box 2:1,1,20,30", "is <mask> like <mask>?"):
        assert session.handle(line)
    assert [turn.get("error") for turn in session.turns] == [None, None]
    assert session.turns[1]["regions"] == [{"image": 1, "region": "0,0,9,9"}, {"image": 2, "region": "1,1,20,30"}]
    marked = [(1, {"box": [5, 5, 30, 30]}), (0, {"box": [0, 0, 9, 9]}), (1, {"box": [1, 1, 20, 30]})]
    assert [(region.image, region.form) for region in talk.regions] == marked
    inputs = talk._inputs(talk.messages[:3], talk.images, talk.regions)
    grid = processor.image_layout((32, 32)).tile_grid
    assert inputs["region_first_tile"].tolist() == [grid.num_tiles, 0, grid.num_tiles]
    alone = [
        processor(pictures[image], "<image><mask>", region_masks=[[form]], return_tensors="pt")["region_cells"][0]
        for image, form in marked
    ]
    for cells, expected in zip(inputs["region_cells"], alone, strict=True):
        assert torch.equal(cells[: len(expected)], expected)
        assert not cells[len(expected) :].any()


def test_a_region_needs_an_image_and_is_forgotten_with_it(region_model, image_of):
    session = Session(Conversation(*region_model, max_new_tokens=4), quiet=True)
    session.handle("/box 0,0,9,9")
    session.handle("/box")
    errors = [turn["error"] for turn in session.turns]
    assert errors[0] == "region 0,0,9,9 has no image to lie in; add the image first"
    assert errors[1] == "a region is missing; write for example /box 10,10,60,40"
    session.waiting = [session.conversation.pack(image_of(32, 32))]
    session.handle("/box 0,0,9,9")
    session.handle("/clear")
    assert not session.marked


def test_a_bad_region_is_told_at_once_and_marks_can_be_dropped(region_model, image_of, tmp_path):
    session = Session(Conversation(*region_model, max_new_tokens=4), quiet=True)
    session.waiting = [session.conversation.pack(image_of(32, 32))]
    Image.new("L", (32, 32)).save(tmp_path / "empty.png")
    session.handle(f"/mask {tmp_path / 'empty.png'}")
    assert "has no pixel set; mark at least one" in session.turns[0]["error"]
    assert session.marked == []
    session.handle("/box 0,0,9,9")
    session.handle("/unmark")
    session.handle("what?")
    assert "error" not in session.turns[-1]


def test_regions_and_images_are_counted_for_each_question_by_itself(region_model, image_of):
    session = Session(Conversation(*region_model, max_new_tokens=4), quiet=True)
    session.waiting = [session.conversation.pack(image_of(32, 32))]
    for line in ("/box 0,0,9,9", "what is <mask>?", "<mask> and <mask>?", "/box 40,40,50,50", "<image>?", "and now?"):
        session.handle(line)
    errors = [turn.get("error", "") for turn in session.turns]
    assert errors[0] == errors[-1] == ""
    assert "as many <mask> markers as regions: 2 markers, 0 regions" in errors[1]
    assert errors[2].startswith("region 1 reaches from (40, 40) to (50, 50)")
    assert "as many <image> markers as images: 1 markers, 0 images" in errors[3]


def test_what_the_model_would_not_see_is_told_when_it_is_marked(region_model, image_of):
    model, processor = region_model
    square = copy.deepcopy(processor)
    square.image_processor.image_mode = "square"  # cuts the sides of a wide image off
    session = Session(Conversation(model, square, max_new_tokens=4), quiet=True)
    session.waiting = [session.conversation.pack(image_of(32, 96))]
    session.handle("/box 0,0,9,9")
    assert session.turns[0]["error"].startswith("region 1 ")
    assert session.marked == []


def test_a_model_without_regions_says_so_when_one_is_marked(conversation, image_of):
    session = Session(conversation, quiet=True)
    session.waiting = [conversation.pack(image_of(32, 32))]
    session.handle("/box 0,0,9,9")
    assert (
        session.turns[0]["error"]
        == "the model has not learned regions; choose one that has, such as --model tiny-regions"
    )


def test_a_picture_shows_images_marks_and_words_so_far(region_model, image_of, tmp_path):
    session = Session(Conversation(*region_model, max_new_tokens=4), quiet=True)
    session.handle(f"/picture {tmp_path / 'early.png'}")
    assert "nothing was said yet" in session.turns[-1]["error"]
    pages = []
    session.waiting = [session.conversation.pack(image_of(32, 32))]
    for place, box in enumerate(("/box 0,0,9,9", "/box 1:10,10,30,30")):
        session.handle(box)
        session.handle("what is <mask>?")
        session.handle(f"/picture {tmp_path / f'{place}.png'}")
        pages.append(Image.open(tmp_path / f"{place}.png"))
    assert pages[1].height - pages[0].height == 2 * LINE  # one picture, and one more question with its answer
    session.handle(f"/picture {tmp_path / 'no.txt'}")
    assert "no.txt must end in .png" in session.turns[-1]["error"]


def test_a_mask_is_read_once_and_its_file_may_go(region_model, image_of, tmp_path):
    session = Session(Conversation(*region_model, max_new_tokens=4), quiet=True)
    session.waiting = [session.conversation.pack(image_of(32, 32))]
    mask = Image.new("L", (32, 32))
    mask.paste(255, (4, 4, 20, 20))
    mask.save(tmp_path / "my mask.png")
    session.handle(f'/mask 1:"{tmp_path / "my mask.png"}"')
    (tmp_path / "my mask.png").unlink()
    session.handle("what is <mask>?")
    session.handle("and what else?")
    assert [turn.get("error") for turn in session.turns] == [None, None]


def test_a_picture_never_overwrites_an_image_of_the_conversation(region_model, image_of, tmp_path):
    session = Session(Conversation(*region_model, max_new_tokens=4), quiet=True)
    image_of(32, 32).save(tmp_path / "photo.png")
    session.handle(f"/image {tmp_path / 'photo.png'}")
    session.handle("what is it?")
    session.handle(f"/picture {tmp_path / 'photo.png'}")
    assert "would overwrite an image of this conversation" in session.turns[-1]["error"]
    assert Image.open(tmp_path / "photo.png").size == (32, 32)


def test_a_mark_without_a_region_model_is_no_text(conversation, image_of):
    session = Session(conversation, quiet=True)
    session.waiting = [session.conversation.pack(image_of(32, 32))]
    session.handle("what is <mask>?")
    assert (
        "the model has not learned regions; choose one that has, such as --model tiny-regions"
        in session.turns[0]["error"]
    )
