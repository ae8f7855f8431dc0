"""The names that the command line knows without importing torch are those that there are."""

from __future__ import annotations

from tokenpacker.cli import known_names


def test_recipes():
    from tokenpacker.carried.recipes import recipes

    assert sorted(known_names.RECIPES) == sorted(recipes())


def test_annotation_formats():
    from tokenpacker.data.annotations import FORMATS

    assert list(known_names.FORMATS) == list(FORMATS)
