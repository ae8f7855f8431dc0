"""The runs of a probe: every projector at every token count, with every number of steps and every seed.

A run's fingerprint covers all that decides its result, so that a row of other settings is never taken for its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tokenpacker import projectors
from tokenpacker.compare.probe import encoders, reading
from tokenpacker.compare.probe.contract import Encoder, Questions, Split, find_encoder, find_questions
from tokenpacker.compare.results import digest_of
from tokenpacker.compare.variants import parse_variant, variant_config
from tokenpacker.features import VisionFeatures
from tokenpacker.projectors import ProjectorConfig, build
from tokenpacker.projectors.layers import ceil_grid
from tokenpacker.speed.model_sizes import settings_at

VERSION = 3  # raised when a run computes something else with the same settings
NUM_HEADS = 4  # of every projector that has heads: those of the carried model's TokenPacker
COUNTS: dict[Split, int] = {"train": 1600, "dev": 320, "test": 320}  # pictures
QUICK_COUNTS: dict[Split, int] = {"train": 64, "dev": 32, "test": 32}


@dataclass(frozen=True, kw_only=True)
class ProbeRun:
    """One projector that learns with one seed."""

    projector: str
    config: ProjectorConfig
    tokens: int
    steps: int
    seed: int

    @property
    def label(self) -> str:
        """Its name in progress."""
        return f"{self.projector}, {self.tokens:,} tokens, {self.steps:,} steps, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Settings of a probe.

    Args:
        questions: the name of a set of pictures in `contract.QUESTIONS`.
        stamps: folder of the photos' cut-outs; None takes the installed package's.
        encoder: a name in `contract.ENCODERS`.
        weights: file of the encoder's weights; None takes the installed ones.
        projectors: registered names; empty takes all. A name may have settings: `resampler:num_heads=2`.
        tokens: packed tokens of a picture. Each count is a run of its own.
        steps: training steps. Each number is a run of its own, with its own schedule of the learning rate.
        split: the pictures that are asked; `dev` is for choosing settings, so that `test` can judge them.
        quick: few pictures, which only show that everything runs.

    Raises:
        ValueError: for unknown names, settings that a projector does not have, and counts that no scale factor gives.
        ImportError: if the encoder's weights are not installed.
    """

    questions: str = "letters"
    stamps: Path | None = None
    encoder: str = "craft"
    weights: Path | None = None
    projectors: tuple[str, ...] = ()
    tokens: tuple[int, ...] = (36,)
    steps: tuple[int, ...] = (400,)
    seeds: tuple[int, ...] = (0, 1, 2)
    split: Split = "test"
    quick: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens", "steps", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}={list(values)} must name at least one, and each once")
        if self.stamps is not None and self.questions != "photos":
            raise ValueError(f"--stamps is for --questions photos, and not for {self.questions}")
        _ = self.material, self.runs  # which check the rest

    @cached_property
    def material(self) -> Questions:
        """The set of pictures."""
        return find_questions(self.questions, self.stamps)

    @cached_property
    def frozen(self) -> Encoder:
        """The encoder."""
        return find_encoder(self.encoder, self.weights)

    @property
    def counts(self) -> dict[Split, int]:
        """How many pictures of which splits are needed."""
        counts = QUICK_COUNTS if self.quick else COUNTS
        return {split: counts[split] for split in ("train", self.split)}

    @property
    def runs(self) -> list[ProbeRun]:
        """All runs, seed by seed, so that an interrupted probe has whole seeds."""
        return [
            ProbeRun(projector=name, config=config, tokens=tokens, steps=steps, seed=seed)
            for seed in self.seeds
            for steps in self.steps
            for name, tokens, config in self._fitting[0]
        ]

    @property
    def skipped(self) -> list[dict[str, Any]]:
        """Projector, tokens and reason where a projector cannot give so many tokens."""
        return self._fitting[1]

    @cached_property
    def protocol(self) -> str:
        """Digest of all that the runs share; rows of one table have the same."""
        learning: list[Any] = [reading.DIM, reading.HEADS, reading.LAYERS, reading.LEARNING_RATE, reading.WEIGHT_DECAY]
        learning += [reading.WARM_UP, reading.BATCH, reading.MAX_GRAD_NORM, reading.WAVES, reading.LOOK]
        features = [encoders.WIDTH, encoders.WHITENING_PICTURES, encoders.WHITENING_EPS]
        parts = [self.questions, self.material.digest, self.encoder, self.frozen.digest, self.frozen.query_level]
        return digest_of([VERSION, parts, self.counts, features, learning])

    def fingerprint(self, run: ProbeRun) -> str:
        """Digest of all that decides a run's result. Settings that are off are left out, as a later option will be."""
        settings = {name: value for name, value in run.config.to_dict().items() if value not in (None, False)}
        return digest_of([self.protocol, settings, run.steps, run.seed])

    @cached_property
    def _fitting(self) -> tuple[list[tuple[str, int, ProjectorConfig]], list[dict[str, Any]]]:
        """Projectors with their configs and token counts, and what is skipped."""
        grid = self.frozen.patch_grid
        scales, every = {tokens: scale_of(tokens, grid) for tokens in self.tokens}, grid[0] * grid[1]
        fitting, skipped = [], []
        for variant in self.projectors or projectors.available():
            own = parse_variant(variant)[1]
            if fixed := {"scale_factor", "vision_dim", "language_dim", "num_levels"} & set(own):
                raise ValueError(f"projector {variant!r}: the probe sets {fixed.pop()}; leave it out (see --tokens)")
            self._config(variant, 1)  # a wrong setting is a mistake, and no reason to skip
            found = {}
            for tokens, scale in scales.items():
                count, config, reason = self._at(variant, scale)
                if config is None or count not in (tokens, every):
                    reason = reason or f"it gives {count} tokens at any scale factor"
                    skipped.append({"projector": variant, "tokens": tokens, "reason": reason})
                else:
                    found[count] = config
            fitting += [(variant, tokens, config) for tokens, config in found.items()]
        return fitting, skipped

    def _at(self, variant: str, scale_factor: int) -> tuple[int, ProjectorConfig | None, str]:
        """How many tokens a picture gets, and the projector; or why it has no such scale factor."""
        try:
            config = self._config(variant, scale_factor)
            with torch.inference_mode():
                tokens = build(config)(blank_features(config, self.frozen.patch_grid, 1))  # (1, T, D)
        except ValueError as error:
            return 0, None, str(error)
        return tokens.shape[1], config, ""

    def _config(self, variant: str, scale_factor: int) -> ProjectorConfig:
        """A projector at the probe's widths: the number of heads is the same for all, all else as in its paper."""
        name, own = parse_variant(variant)
        widths = {"vision_dim": encoders.WIDTH, "language_dim": reading.DIM, "num_levels": self.frozen.num_levels}
        plain = variant_config({"name": name, **widths})
        heads = {"num_heads": NUM_HEADS} if hasattr(plain, "num_heads") else {}
        at_scale = settings_at(plain, self.frozen.patch_grid, scale_factor)
        return variant_config({"name": name, **widths, **at_scale, **heads, **own})


def scale_of(tokens: int, patch_grid: tuple[int, int]) -> int:
    """The scale factor that packs a patch grid to so many tokens, one that divides the grid if there is one.

    Raises:
        ValueError: if there is none; the message has the counts that there are.
    """
    found: dict[int, int] = {}
    for scale in sorted(range(1, min(patch_grid) + 1), key=lambda scale: any(side % scale for side in patch_grid)):
        rows, cols = ceil_grid(patch_grid, scale)
        found.setdefault(rows * cols, scale)
    if tokens not in found:
        rows, cols = patch_grid
        counts = ", ".join(map(str, sorted(found, reverse=True)))
        raise ValueError(f"--tokens {tokens}: no scale factor of {rows}x{cols} patches gives so many; use {counts}")
    return found[tokens]


def blank_features(config: ProjectorConfig, patch_grid: tuple[int, int], num_pictures: int) -> VisionFeatures:
    """Features of the right shapes, for what does not depend on their values."""
    levels = torch.zeros(num_pictures, patch_grid[0] * patch_grid[1], config.num_levels * config.vision_dim)
    return VisionFeatures(levels[..., : config.vision_dim], levels, patch_grid)
