"""Plans: the same counts as everywhere else, and nothing loaded for them."""

import dataclasses

import pytest

from tokenpacker.speed.model_sizes import candidates, named_shapes, shapes_of_folder
from tokenpacker.speed.speed_plan import make_plan


def rows_of(plan, **fields):
    rows = plan.to_dict()["rows"]
    return [row for row in rows if all(row[name] == value for name, value in fields.items())]


def test_every_mode_and_scale_factor_is_planned_and_the_mlp_once_a_mode():
    plan = make_plan(named_shapes("7b"), (2000, 3000))
    named = [(row["projector"], row["scale_factor"]) for row in plan.rows if row["mode"] == "slice"]
    packing = [(name, scale) for name in ("token-packer", "average-pool") for scale in (2, 3, 4)]
    assert named == [*packing, ("mlp", None)]
    assert len(plan.rows) == 2 * len(named)


def test_tokens_are_those_of_the_paper():
    plan = make_plan(named_shapes("7b"), (336, 336), text_tokens=10)
    tokens = {row["scale_factor"]: row["image_tokens"] for row in rows_of(plan, mode="one-tile")}
    assert tokens == {2: 144, 3: 64, 4: 36, None: 576}
    assert [row["image_tokens"] for row in rows_of(plan, mode="slice", projector="mlp")] == [577]  # and a separator
    assert all(row["prompt_tokens"] == row["image_tokens"] + 10 for row in plan.to_dict()["rows"])


def test_a_large_image_costs_its_tiles_and_their_thumbnail():
    (row,) = rows_of(
        make_plan(named_shapes("7b"), (2000, 3000), scale_factor=2), mode="slice", projector="token-packer"
    )
    assert (row["grid"], row["tiles"], row["image_tokens"]) == ([2, 3], 7, 7 * 145)
    assert row["cache_bytes"] == (7 * 145 + 64) * 2**19
    assert row["full_cache_bytes"] == (7 * 145 + 64 + 127) * 2**19  # the last token is never read
    assert row["flops"]["first_token"] == sum(
        row["flops"][part] for part in ("vision", "projector", "language", "head")
    )


def test_a_plan_counts_as_the_model_s_own_processor(tiny_model_dir, tiny_processor):
    plan = make_plan(shapes_of_folder(tiny_model_dir, "tiny"), (60, 90))
    for row in rows_of(plan, mode="slice", projector="token-packer"):
        layout = tiny_processor.image_layout((60, 90), scale_factor=row["scale_factor"])
        assert (row["image_tokens"], row["tiles"]) == (layout.num_tokens, layout.tile_grid.num_tiles)


def test_a_prompt_beyond_the_language_model_s_context_is_said():
    plan = make_plan(named_shapes("7b"), (2000, 3000), scale_factor=2)
    assert [row["projector"] for row in plan.to_dict()["rows"] if not row["fits_context"]] == ["mlp"]
    assert "context of 4,096 tokens" in plan.notes[-1]
    assert make_plan(named_shapes("7b"), (336, 336), scale_factor=2).notes == []


def test_a_scale_factor_that_a_projector_cannot_honour_is_left_out_and_said(tiny_model_dir):
    plan = make_plan(shapes_of_folder(tiny_model_dir, "tiny"), projectors=["pixel-shuffle"])  # an 8 x 8 grid
    assert {row["scale_factor"] for row in rows_of(plan, projector="pixel-shuffle")} == {2, 4}
    assert plan.notes[0].startswith("pixel-shuffle: scale_factor=3 does not divide patch_grid=8x8")
    with pytest.raises(ValueError, match="scale_factor=3 does not divide patch_grid=8x8"):
        make_plan(plan.shapes, projectors=["pixel-shuffle"], scale_factor=3)


def test_learned_queries_are_as_many_as_the_others_have_tokens():
    shapes = named_shapes("7b")
    tokens = [one.config.num_tokens(shapes.config.patch_grid) for one in candidates(shapes, ["resampler"], 3)]
    assert tokens == [64, 64, 576]


def test_theory_compares_with_the_mlp_of_the_same_mode():
    plan = make_plan(named_shapes("small"), (672, 672), scale_factor=2)
    for mode in ("one-tile", "slice"):
        (full,) = rows_of(plan, mode=mode, projector="mlp")
        (row,) = rows_of(plan, mode=mode, projector="average-pool")
        assert full["saved_by_theory"] == 1
        expected = full["flops"]["first_token"] / row["flops"]["first_token"]
        assert row["saved_by_theory"] == pytest.approx(expected, abs=0.0005)  # it is rounded to three decimals


def test_the_cache_is_twice_as_large_in_float32():
    wide, narrow = (make_plan(named_shapes("small"), dtype=dtype).rows[0] for dtype in ("float32", "float16"))
    assert wide["cache_bytes"] == 2 * narrow["cache_bytes"]
    with pytest.raises(ValueError, match="dtype='int3' is no type of keys and values; use one of float32"):
        make_plan(named_shapes("small"), dtype="int3")


def test_a_limit_of_tiles_is_kept():
    shapes = dataclasses.replace(named_shapes("small"), max_tiles=4)
    assert {row["tiles"] for row in rows_of(make_plan(shapes, (2000, 2000)), mode="slice")} == {5}
