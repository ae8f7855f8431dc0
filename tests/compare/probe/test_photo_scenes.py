import numpy as np
import pytest

from stand_in_stamps import kind_color, make_stamps
from tokenpacker.compare.probe.contract import NO_ANSWER, find_questions
from tokenpacker.compare.probe.photo_scenes import CELL, CELLS, FRAME_COLORS, KINDS, NUM_CELLS, SORTS, SPLITS, Photos


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Photos:
    return find_questions("photos", make_stamps(tmp_path_factory.mktemp("stamps")))


def by_sort(answers: np.ndarray) -> dict[str, np.ndarray]:
    ends = np.cumsum([questions for questions, _ in SORTS.values()])
    return dict(zip(SORTS, np.split(answers, ends[:-1]), strict=True))


def test_the_answers_are_what_the_pixels_show(photos):
    for number in range(12):
        scene, answers = photos.draw("train", number)
        answer, pixels, kinds_seen = by_sort(answers), np.asarray(scene), 0
        for cell in range(NUM_CELLS):
            row, col = divmod(cell, CELLS)
            shown = set(map(tuple, pixels[row * CELL :, col * CELL :][:CELL, :CELL].reshape(-1, 3).tolist()))
            kinds = [kind for kind in range(len(KINDS)) if kind_color(kind) in shown]
            colors = [place for place, color in enumerate(FRAME_COLORS.values()) if color in shown]
            assert kinds == [kind for kind in answer["kind"][[cell]] if kind != NO_ANSWER]
            assert colors == [color for color in answer["color"][[cell]] if color != NO_ANSWER]
            assert all(answer["place"][kind] == cell for kind in kinds)
            kinds_seen += len(kinds)
        assert kinds_seen == (answer["place"] != NO_ANSWER).sum() == 3 + answer["number"][0]


def test_a_scene_depends_on_its_split_and_number_alone(photos):
    def drawn(split, number):
        scene, answers = photos.draw(split, number)
        return scene.tobytes(), answers.tobytes()

    scenes = {(split, number): drawn(split, number) for split in SPLITS for number in range(4)}
    assert scenes == {given: drawn(*given) for given in reversed(scenes)}
    assert len(set(scenes.values())) == len(scenes)


def test_no_answer_can_be_guessed_better_than_by_chance(photos):
    drawn = [photos.draw("test", number)[1] for number in range(300)]
    asked = {sort: [by_sort(answers)[sort] for answers in drawn] for sort in SORTS}
    for sort, (_, classes) in SORTS.items():
        answers = np.concatenate(asked[sort])
        counts = np.bincount(answers[answers != NO_ANSWER], minlength=classes)
        assert len(counts) == classes
        # four standard deviations of a fair draw
        assert abs(counts - counts.mean()).max() < 4 * counts.mean() ** 0.5


def test_splits_share_no_cut_out_and_no_word(photos):
    words = {
        split: {(kind, path.stem.split("_")[0]) for kind, paths in photos.cut_outs[split].items() for path in paths}
        for split in SPLITS
    }
    assert {kind for kind, _ in words["test"]} == {kind for kind, _ in words["dev"]} == set(KINDS)
    assert len(set.union(*words.values())) == sum(map(len, words.values())) == 5 * len(KINDS)


def test_drawings_are_left_out(photos):
    files = [path for split in SPLITS for paths in photos.cut_outs[split].values() for path in paths]
    assert len(files) == 10 * len(KINDS)
    assert not any("cartoon" in path.parts for path in files)


def test_the_digest_changes_with_a_cut_out(photos, tmp_path):
    others = make_stamps(tmp_path)
    assert Photos(others).digest == photos.digest
    changed = Photos(others).cut_outs["test"]["bird"][0]
    changed.write_bytes(changed.read_bytes() + b" ")
    assert Photos(others).digest != photos.digest


def test_a_folder_without_cut_outs_names_the_commands_that_get_them(tmp_path):
    with pytest.raises(ValueError, match=r"too few cut-outs of .*dpkg -x") as error:
        Photos(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_kinds_with_too_few_cut_outs_are_named(tmp_path):
    stamps = make_stamps(tmp_path)
    for path in stamps.rglob("symbols/money/*_[12].png"):
        if not path.stem.startswith("ash"):
            path.unlink()
    with pytest.raises(ValueError, match="too few cut-outs of coin;"):
        Photos(stamps)
