from __future__ import annotations

import pytest

from tokenpacker.compare.probe.probe_plan import scale_of
from tokenpacker.compare.variants import parse_variant, variant_config
from tokenpacker.projectors import available


def test_token_counts_choose_the_scale_factor():
    assert [scale_of(tokens, (24, 24)) for tokens in (576, 144, 64, 36, 25, 16, 9, 4, 1)] == [
        1,
        2,
        3,
        4,
        5,
        6,
        8,
        12,
        24,
    ]
    with pytest.raises(
        ValueError, match=r"--tokens 100: no scale factor of 24x24 patches gives so many; use 576, 144, 64"
    ):
        scale_of(100, (24, 24))


def test_every_projector_runs_at_every_count_with_every_seed(small_probe):
    probe = small_probe(projectors=(), tokens=(25, 1), seeds=(4, 7), steps=(2, 3))
    runs = {(run.projector, run.tokens, run.steps, run.seed) for run in probe.runs}
    kept = {(name, tokens) for name in available() for tokens in (25, 1) if (name, tokens) != ("mlp", 1)}
    assert runs == {(*pair, steps, seed) for pair in kept for steps in (2, 3) for seed in (4, 7)}
    assert [run.seed for run in probe.runs] == sorted(run.seed for run in probe.runs)
    assert all(run.config.num_tokens((5, 5)) == run.tokens for run in probe.runs)


def test_what_a_projector_cannot_do_is_skipped_with_a_reason(small_probe):
    probe = small_probe(projectors=("pixel-shuffle", "resampler:query_grid=[3,3]"), tokens=(25, 9))
    assert [(run.projector, run.tokens) for run in probe.runs] == [
        ("pixel-shuffle", 25),
        ("resampler:query_grid=[3,3]", 9),
    ]
    assert [(entry["projector"], entry["tokens"]) for entry in probe.skipped] == [
        ("pixel-shuffle", 9),
        ("resampler:query_grid=[3,3]", 25),
    ]
    assert "does not divide" in probe.skipped[0]["reason"]
    assert probe.skipped[1]["reason"] == "it gives 9 tokens at any scale factor"


def test_a_full_token_projector_runs_once(small_probe):
    probe = small_probe(projectors=("mlp",), tokens=(9, 4, 1))
    assert [(run.projector, run.tokens) for run in probe.runs] == [("mlp", 25)]
    assert probe.skipped == []


def test_all_projectors_have_as_many_heads_unless_one_is_asked_for(small_probe):
    probe = small_probe(projectors=("token-packer", "resampler", "token-packer:num_heads=2"))
    assert [run.config.num_heads for run in probe.runs] == [4, 4, 2]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"projectors": ("token-packer:num_heads=5",)}, "num_heads=5 does not divide vision_dim=96"),
        ({"projectors": ("token-packer:heads=2",)}, "unknown keys"),
        ({"projectors": ("token-packer:scale_factor=2",)}, "the probe sets scale_factor; leave it out"),
        ({"projectors": ("token-packer:num_heads",)}, "must be KEY=VALUE"),
        ({"projectors": ("nonsense",)}, "unknown projector 'nonsense'"),
        ({"tokens": (7,)}, "--tokens 7: no scale factor of 5x5 patches"),
        ({"seeds": (0, 0)}, r"seeds=\[0, 0\] must name at least one, and each once"),
    ],
)
def test_mistakes_are_errors_and_no_reason_to_skip(small_probe, settings, words):
    with pytest.raises(ValueError, match=words):
        small_probe(**settings)


def test_all_that_decides_a_result_is_in_the_fingerprint(small_probe, monkeypatch):
    def fingerprints(probe) -> set[str]:
        return {probe.fingerprint(run) for run in probe.runs}

    base = small_probe(steps=(4, 5), seeds=(0, 1))
    others = [
        small_probe(tokens=(4,)),
        small_probe(projectors=("ldp-v2", "token-packer", "token-packer:num_heads=2")),
        small_probe(split="dev"),
        small_probe(quick=False),
    ]
    for attribute in ("material", "frozen"):
        other = small_probe()
        getattr(other, attribute).digest = "another"
        others.append(other)
    every = [fingerprints(probe) for probe in (base, *others)]
    assert [len(found) for found in every] == [4, 1, 3, 1, 1, 1, 1]
    assert len(set.union(*every)) == 12
    assert fingerprints(small_probe(steps=(4, 5), seeds=(0, 1))) == every[0]


def test_values_of_settings_are_numbers_truths_lists_and_words():
    assert parse_variant("a:b=2:c=true:d=False:e=[3,3]:f=0.5:g=word") == (
        "a",
        {"b": 2, "c": True, "d": False, "e": [3, 3], "f": 0.5, "g": "word"},
    )


def test_a_setting_that_is_true_or_false_takes_nothing_else(monkeypatch):
    import dataclasses

    from tokenpacker.projectors import Mlp, MlpConfig, base

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Switched(MlpConfig):
        name = "switched"
        switch: bool = False

    monkeypatch.setitem(base._REGISTRY, "switched", (Switched, Mlp))
    assert variant_config({"name": "switched", "switch": True}).switch is True
    with pytest.raises(ValueError, match="switch='no' of switched must be true or false"):
        variant_config({"name": "switched", "switch": "no"})
