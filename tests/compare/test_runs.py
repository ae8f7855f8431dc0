import dataclasses

import pytest
import torch

from tokenpacker import projectors
from tokenpacker.compare.runs import Comparison, Run, _without_what_is_off
from tokenpacker.data.sources import open_source
from tokenpacker.sequence import IGNORED
from tokenpacker.train.assemble import load_processor

BUILT_IN = (
    *("average-pool", "c-abstractor", "dense-connector", "ldp-v2"),
    *("mlp", "pixel-shuffle", "resampler", "token-packer"),
)


def test_every_projector_is_trained_at_every_scale_factor_and_the_mlp_once(comparison_of):
    runs = comparison_of(projectors=BUILT_IN, scale_factors=(2, 4), seeds=(0, 1)).runs()
    assert len(runs) == 2 * (7 * 2 + 1)
    assert [run.seed for run in runs] == [0] * 15 + [1] * 15
    assert [run.scale_factor for run in runs if run.projector == "mlp"] == [1, 1]
    assert [run.scale_factor for run in runs if run.projector == "resampler"] == [2, 4, 2, 4]


def test_a_resampler_that_would_have_as_many_queries_as_patches_is_no_full_token_row(comparison_of, monkeypatch):
    monkeypatch.setattr(Comparison, "patch_grid", (12, 12))  # and 12 x 12 queries are its default
    runs = comparison_of(projectors=("resampler",), scale_factors=(2, 4)).runs()
    assert [run.scale_factor for run in runs] == [2, 4]


def test_without_a_list_all_that_are_installed_are_compared(comparison_of):
    assert {run.projector for run in comparison_of().runs()} == set(projectors.available())


@pytest.mark.parametrize("name", BUILT_IN)
def test_all_have_as_many_tokens_but_the_mlp(comparison_of, name):
    comparison = comparison_of(projectors=(name,), scale_factors=(2, 4))
    counts = [comparison.projector(run).num_tokens(comparison.patch_grid) for run in comparison.runs()]
    assert counts == ([16] if name == "mlp" else [4, 1])


def test_runs_differ_in_nothing_but_projector_and_seed(comparison_of):
    comparison = comparison_of(projectors=BUILT_IN, seeds=(0, 3))
    contents = []
    for run in comparison.runs():
        if run.projector != "mlp":
            stages = [stage.to_dict() for stage in comparison.stages(run)]
            assert [stage["model"].pop("projector")["name"] for stage in stages] == [run.projector] * 2
            assert [stage.pop("seed") for stage in stages] == [1 + run.seed, 2 + run.seed]
            contents.append(stages)
    assert all(stages == contents[0] for stages in contents)
    assert [stage["scale_factors"] for stage in contents[0]] == [[2], [2]]


def test_all_runs_of_a_seed_see_the_same_pictures_and_learn_the_same_answers(comparison_of, tmp_path):
    comparison = comparison_of(projectors=("mlp", "average-pool"), scale_factors=(2, 4), steps=(2, 2))
    shown = {"align-tiny": [], "instruct-tiny": []}
    for run in comparison.runs():
        for stage in comparison.stages(run):
            source = open_source(stage, load_processor(comparison.stages(run)[0].model), tmp_path)
            shown[stage.name].append([source.batches[index] for index in range(2)])
    for of_runs in shown.values():
        for batches in zip(*of_runs, strict=True):
            assert len({batch["input_ids"].shape[1] for batch in batches}) == 3  # as the image tokens are fewer
            learned = [batch["labels"][batch["labels"] != IGNORED] for batch in batches]
            for batch, labels in zip(batches, learned, strict=True):
                torch.testing.assert_close(batch["pixel_values"], batches[0]["pixel_values"], atol=0, rtol=0)
                torch.testing.assert_close(labels, learned[0])


def test_options_that_are_off_leave_a_fingerprint_as_it_was(comparison_of):
    on = {"steps": 0, "seed": 3, "name": "x", "inner": {"share": 0.5}}
    assert _without_what_is_off({**on, "new": None, "quick": False, "list": [], "part": {"option": None}}) == on


def test_learned_queries_and_positions_are_laid_out_for_the_encoder(comparison_of):
    comparison = comparison_of(projectors=("resampler", "c-abstractor", "token-packer"))
    resampler, abstractor, packer = (
        comparison.projector(Run(projector=name, scale_factor=2, seed=0)) for name in comparison.projectors
    )
    assert resampler.query_grid == (2, 2)
    assert abstractor.position_grid == (4, 4)
    assert resampler.num_heads == packer.num_heads == 4  # the recipe's


def test_a_fingerprint_changes_with_what_a_run_computes_and_with_nothing_else(comparison_of, tmp_path):
    comparison = comparison_of(projectors=("mlp", "average-pool"))
    run = comparison.runs()[1]
    changes = (
        {"steps": (2, 1)}, {"steps": (1, 2)}, {"limit": 7}, {"foundation": "another"}, {"quick": False},
    )  # fmt: skip
    known = {comparison.fingerprint(run)}
    for change in changes:
        changed = dataclasses.replace(comparison, **change)
        assert changed.protocol != comparison.protocol
        known.add(changed.fingerprint(run))
    for change in ({"seed": 1}, {"scale_factor": 4}, {"projector": "ldp-v2"}):
        known.add(comparison.fingerprint(dataclasses.replace(run, **change)))
    assert len(known) == 1 + len(changes) + 3
    same = dataclasses.replace(comparison, num_workers=3, projectors=("average-pool",), seeds=(0, 1, 2))
    assert same.fingerprint(run) == comparison.fingerprint(run)


def test_a_projector_may_have_settings_of_its_own(comparison_of):
    variant = "token-packer:num_heads=2"
    comparison = comparison_of(projectors=("token-packer", variant))
    plain, changed = comparison.runs()
    assert (changed.projector, changed.label) == (variant, f"{variant}, s = 2, seed 0")
    assert comparison.projector(changed) == dataclasses.replace(comparison.projector(plain), num_heads=2)
    assert comparison.fingerprint(changed) != comparison.fingerprint(plain)
    assert dataclasses.replace(comparison, projectors=("token-packer",)).protocol == comparison.protocol
    with pytest.raises(ValueError, match=r"unknown keys \['heads'\] for projector"):
        comparison_of(projectors=("token-packer:heads=2",))
    with pytest.raises(ValueError, match="'heads' must be KEY=VALUE, as in resampler:num_heads=2"):
        comparison_of(projectors=("token-packer:heads",))
    with pytest.raises(ValueError, match=r"'token-packer:scale_factor=3': .* use --scale-factors"):
        comparison_of(projectors=("token-packer:scale_factor=3",))


def test_what_cannot_be_compared_is_refused(comparison_of):
    with pytest.raises(ValueError, match="projector 'nonsense' is unknown; use some of average-pool, "):
        comparison_of(projectors=("nonsense",))
    with pytest.raises(ValueError, match="scale_factor=3 does not divide patch_grid=4x4"):
        comparison_of(projectors=("pixel-shuffle",), scale_factors=(3,)).runs()
    with pytest.raises(ValueError, match=r"seeds=\[0, 0\] must name at least one, and each once"):
        comparison_of(seeds=(0, 0))
    with pytest.raises(ValueError, match="data of align-7b are missing; give --data-align and --data-instruct"):
        Comparison(recipe=("align-7b", "instruct-7b"))


def test_a_real_recipe_keeps_all_but_the_projector(tmp_path, monkeypatch):
    from tokenpacker.carried.recipes import find_recipe
    from tokenpacker.compare.runs import StageData

    monkeypatch.setattr(Comparison, "patch_grid", (24, 24))  # CLIP-L/336's, without its config from the hub
    data = (StageData(path="align.json"), StageData(path="instruct.json", images="pictures"))
    comparison = Comparison(recipe=("align-7b", "instruct-7b"), projectors=("resampler",), data=data, seeds=(0,))
    run = comparison.runs()[0]
    align, instruct = comparison.stages(run)
    expected = find_recipe("align-7b")
    assert align.model == dataclasses.replace(expected.model, projector={"name": "resampler", "query_grid": [12, 12]})
    assert align.data == dataclasses.replace(expected.data, path="align.json")
    assert (instruct.data.images, instruct.max_steps, instruct.scale_factors) == ("pictures", None, ())
    assert not comparison.is_tested
