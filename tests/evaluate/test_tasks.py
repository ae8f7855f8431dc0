"""The table of tasks: names, sizes, disjointness, and errors that name the remedy."""

import sys

import pytest

from tokenpacker.evaluate import find_task, tasks
from tokenpacker.scenes import FinePrint


def test_easy_vqa_is_the_whole_official_test_split():
    pytest.importorskip("easy_vqa", reason="needs the easy-vqa package")
    samples = find_task("easy-vqa").load()
    assert len(samples) == 1000
    assert sum(len(sample.questions) for sample in samples) == 9673
    assert len({sample.name for sample in samples}) == 1000


def test_fine_print_is_always_the_same_images_of_the_test_seeds(monkeypatch):
    monkeypatch.setattr(tasks, "NUM_FINE_PRINT_IMAGES", 5)
    samples = find_task("fine-print").load()
    assert len(samples) == 5
    for index, sample in enumerate(samples):
        expected = FinePrint("test")[index]
        assert (sample.name, sample.questions) == (expected.name, expected.questions)
        assert sample.image.tobytes() == expected.image.tobytes()


def test_region_tasks_ask_the_same_of_the_same_images_and_differ_in_what_they_mark(monkeypatch):
    monkeypatch.setattr(tasks, "NUM_REGION_IMAGES", 4)
    exact, boxes, exchanged = (find_task(f"regions{ending}").load() for ending in ("", "-boxes", "-shuffled"))
    for one, boxed, other in zip(exact, boxes, exchanged, strict=True):
        assert one.name == boxed.name == other.name
        assert one.questions == boxed.questions == other.questions
        assert all(len(region) == 4 for region in boxed.regions)
        assert [region.tobytes() for region in one.regions] != [region.tobytes() for region in other.regions]
        assert sorted(region.tobytes() for region in one.regions) == sorted(
            region.tobytes() for region in other.regions
        )


def test_an_unknown_task_lists_the_valid_ones():
    with pytest.raises(ValueError, match="task 'gqa' is unknown; use one of: easy-vqa, fine-print"):
        find_task("gqa")


def test_a_missing_data_package_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .*tokenpacker\[evaluate\]"):
        find_task("easy-vqa").load()
