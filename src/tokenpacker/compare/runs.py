"""The runs of a comparison: every projector at every scale factor with every seed, as training configs.

A run's fingerprint covers all settings that decide its result. Each row of results has one, so that a row of other
settings is never taken for this run.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from typing import Any

from tokenpacker import projectors
from tokenpacker.carried.recipes import find_recipe
from tokenpacker.compare.results import Row, digest_of
from tokenpacker.compare.tiles import ASKED
from tokenpacker.compare.variants import parse_variant, variant_config
from tokenpacker.projectors import ProjectorConfig
from tokenpacker.speed.machine import best_device, describe_machine
from tokenpacker.speed.model_sizes import settings_at
from tokenpacker.train.assemble import model_config
from tokenpacker.train.config import TrainingConfig
from tokenpacker.train.run_folder import MAY_CHANGE

TINY = ("align-tiny", "instruct-tiny")
STAGES = ("align", "instruct")
VERSION = (
    3  # raised when a run computes something else with the same config; 1 had fresh weights of 0.02 at every width
)
PACE = 2  # the scale factor whose token count decides the pictures per step; smaller scale factors decide themselves


@dataclass(frozen=True, kw_only=True)
class Run:
    """One model to be trained. A scale factor of 1 keeps every patch token.

    Args:
        projector: a registered name, with settings behind it where they are not its own: `resampler:num_heads=2`.
    """

    projector: str
    scale_factor: int
    seed: int

    @property
    def label(self) -> str:
        """Its name in progress and errors."""
        return f"{self.projector}, s = {self.scale_factor}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class StageData:
    """Training data of a stage of a real recipe; see `train.config.DataConfig`."""

    path: str | None = None
    images: str | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Settings shared by all runs of a comparison, and the settings in which they differ.

    Args:
        vision_tower: folder or hub id, frozen in all runs; None takes the recipe's.
        language_model: start of all runs; None takes the recipe's.
        foundation: digest of the weights of both, for weights in local files.
        recipe: names of the recipes of both stages.
        projectors: registered names; empty takes all that are installed. A name may have settings after colons:
            `resampler:num_heads=2`.
        steps: of each stage; None takes the recipe's.
        data: of each stage, for recipes that do not draw their own.
        limit: number of questions of each task, drawn at random; None asks all.
        quick: marks results that only show that everything runs.
        num_workers: processes of each run that draw its pictures; None takes the recipe's.
    """

    vision_tower: str | None = None
    language_model: str | None = None
    foundation: str = ""
    recipe: tuple[str, str] = TINY
    projectors: tuple[str, ...] = ()
    scale_factors: tuple[int, ...] = (2, 4)
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: tuple[int | None, int | None] = (None, None)
    data: tuple[StageData, StageData] = (StageData(), StageData())
    limit: int | None = None
    quick: bool = False
    num_workers: int | None = None

    def __post_init__(self) -> None:
        for name in ("scale_factors", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}={list(values)} must name at least one, and each once")
        known = projectors.available()
        for variant in self.projectors:
            name, settings = parse_variant(variant)
            if name not in known:
                raise ValueError(f"projector {name!r} is unknown; use some of {', '.join(known)}")
            if "scale_factor" in settings:
                raise ValueError(f"projector {variant!r}: scale factors are asked of all alike; use --scale-factors")
            variant_config({"name": name, **settings})
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit} must be at least 1; leave it out to ask every question")
        for stage, data in zip(self._templates, self.data, strict=True):
            if stage.data.scenes is not None and data.path is not None:
                raise ValueError(f"data {data.path} has no use: {stage.name} draws its own pictures; leave it out")
            if stage.data.scenes is None and data.path is None:
                raise ValueError(f"data of {stage.name} are missing; give --data-align and --data-instruct")

    def runs(self) -> list[Run]:
        """All runs, seed by seed, so that an interrupted comparison has whole seeds.

        Raises ValueError for a scale factor that does not fit a projector on the encoder's patch grid.
        """
        names = self.projectors or projectors.available()
        pairs = [(name, scale_factor) for name in names for scale_factor in self._honoured(name)]
        return [Run(projector=name, scale_factor=scale, seed=seed) for seed in self.seeds for name, scale in pairs]

    def runs_of_one_seed(self) -> list[Run]:
        """One run for each projector and scale factor."""
        return [run for run in self.runs() if run.seed == self.seeds[0]]

    @property
    def is_tested(self) -> bool:
        """Whether the models are asked test questions: those of recipes that learn from generated scenes."""
        return self._templates[1].data.scenes is not None

    def stages(self, run: Run) -> tuple[TrainingConfig, TrainingConfig]:
        """The configs of both stages; the caller sets the second one's `model.start`."""
        align, instruct = (self._stage(template, run) for template in self._templates)
        return align, instruct

    def projector(self, run: Run) -> ProjectorConfig:
        """The run's projector, with the widths of its model."""
        return model_config(self.stages(run)[0].model).projector

    @property
    def protocol(self) -> str:
        """Digest of all shared settings; rows of one table have the same."""
        common = [_decisive(template) for template in self._templates]
        for content in common:
            for key in ("seed", "scale_factors"):
                content.pop(key, None)
            del content["model"]["projector"]
        parts = [self.vision_tower or "", self.language_model or ""] if not self.foundation else [self.foundation]
        return digest_of([VERSION, common, parts, ASKED if self.is_tested else [], self.limit, self.quick])

    def fingerprint(self, run: Run) -> str:
        """Digest of all settings that decide a run's result."""
        stages = [_decisive(stage) for stage in self.stages(run)]
        return digest_of([self.protocol, dataclasses.asdict(run), stages])

    @cached_property
    def patch_grid(self) -> tuple[int, int]:
        """(rows, cols) of the encoder."""
        return model_config(self._templates[0].model).patch_grid

    @cached_property
    def _templates(self) -> tuple[TrainingConfig, TrainingConfig]:
        """The recipes of both stages with this comparison's parts, steps and data."""
        align, instruct = (
            dataclasses.replace(
                config,
                model=dataclasses.replace(config.model, **self._parts),
                data=dataclasses.replace(
                    config.data,
                    path=data.path,
                    images=data.images,
                    scenes=config.data.scenes
                    and dataclasses.replace(config.data.scenes, paced_at=min(PACE, *self.scale_factors)),
                    num_workers=config.data.num_workers if self.num_workers is None else self.num_workers,
                ),
                max_steps=config.max_steps if steps is None else steps,
            )
            for config, steps, data in zip(map(find_recipe, self.recipe), self.steps, self.data, strict=True)
        )
        return align, instruct

    @property
    def _parts(self) -> dict[str, Any]:
        parts = {"vision_tower": self.vision_tower, "language_model": self.language_model}
        return {name: value for name, value in parts.items() if value is not None}

    def _stage(self, template: TrainingConfig, run: Run) -> TrainingConfig:
        settings = self._settings(run.projector, run.scale_factor)
        return dataclasses.replace(
            template,
            model=dataclasses.replace(template.model, projector=settings),
            scale_factors=(run.scale_factor,) if template.data.scenes is not None else (),
            seed=template.seed + run.seed,
        )

    def _settings(self, variant: str, scale_factor: int) -> dict[str, Any]:
        """A projector's settings at a scale factor: the recipe's number of heads, all else as in its paper."""
        name, own = parse_variant(variant)
        config = variant_config({"name": name})
        settings = {"name": name} | settings_at(config, self.patch_grid, scale_factor)
        heads = self._templates[0].model.projector.get("num_heads")
        if heads is not None and hasattr(config, "num_heads"):
            settings["num_heads"] = heads
        return settings | own

    def _honoured(self, variant: str) -> list[int]:
        """The scale factors of a projector's runs: 1 alone for one that keeps every token."""
        depends = self._settings(variant, 1) != self._settings(variant, 2)
        if not depends and variant_config(self._settings(variant, 1)).token_grid(self.patch_grid) == self.patch_grid:
            return [1]
        for scale_factor in self.scale_factors:
            variant_config(self._settings(variant, scale_factor)).token_grid(self.patch_grid, scale_factor)
        return list(self.scale_factors)


def _decisive(config: TrainingConfig) -> dict[str, Any]:
    """The settings that decide the result of a training run, without those that may change when it is resumed.

    Options that are off are left out, so that rows stay valid when a later version has more options.
    """
    content = config.to_dict()
    for setting in MAY_CHANGE:
        part, _, key = setting.rpartition(".")
        del (content[part] if part else content)[key]
    return _without_what_is_off(content)


def _without_what_is_off(content: dict[str, Any]) -> dict[str, Any]:
    parts = {key: _without_what_is_off(value) if isinstance(value, dict) else value for key, value in content.items()}
    return {key: value for key, value in parts.items() if value or (value == 0 and value is not False)}


def make_row(kind: str, comparison: Comparison, fingerprint: str, command: str, content: Row) -> Row:
    """A row for the results file, with its settings, date, command line and machine."""
    return {
        "kind": kind,
        "protocol": comparison.protocol,
        "fingerprint": fingerprint,
        "quick": comparison.quick,
        **content,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "machine": describe_machine(best_device()),
    }
