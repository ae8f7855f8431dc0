"""What is compared: every projector at every scale factor with every seed, as training configs that differ in these.

A run's fingerprint covers all that decides what it computes. Rows of results carry it, so that a row of other settings
is never taken for a run of these.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenpacker import projectors
from tokenpacker.carried.recipes import find_recipe
from tokenpacker.compare.tiles import ASKED
from tokenpacker.projectors import ProjectorConfig, config_from_dict
from tokenpacker.train.assemble import model_config
from tokenpacker.train.config import TrainingConfig
from tokenpacker.train.run_folder import MAY_CHANGE

TINY = ("align-tiny", "instruct-tiny")
STAGES = ("align", "instruct")
VERSION = 3  # of what a run computes, for changes that no config shows; 1 had fresh weights of 0.02 at every width
PACE = 2  # scale factor whose tokens decide how many pictures a step shows; a smaller one is its own
ANY_WIDTH = 128  # of a config that is only asked what fields it has and how it counts


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
        """As progress and errors name it."""
        return f"{self.projector}, s = {self.scale_factor}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class StageData:
    """Files that a stage of a real recipe learns from; see `train.config.DataConfig`."""

    path: str | None = None
    images: str | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that is the same for all runs, and what they differ in.

    Args:
        vision_tower: folder or hub id, frozen in all runs; None takes the recipe's.
        language_model: that all runs begin with; None takes the recipe's.
        foundation: digest of the weights of both, where they are files of one's own.
        recipe: names of the recipes of both stages.
        projectors: registered names; empty takes all that are installed. Settings of its own stand behind a name,
            with colons between: `resampler:num_heads=2`.
        steps: of each stage; None takes the recipe's.
        data: of each stage, for recipes that do not draw their own.
        limit: so many questions of each task, drawn at random; None asks all.
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
            name, settings = _parse(variant)
            if name not in known:
                raise ValueError(f"projector {name!r} is unknown; use some of {', '.join(known)}")
            if "scale_factor" in settings:
                raise ValueError(f"projector {variant!r}: scale factors are asked of all alike; use --scale-factors")
            _config({"name": name, **settings})
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit} must be at least 1; leave it out to ask every question")
        for stage, data in zip(self._templates, self.data, strict=True):
            if stage.data.scenes is not None and data.path is not None:
                raise ValueError(f"data {data.path} has no use: {stage.name} draws its own pictures; leave it out")
            if stage.data.scenes is None and data.path is None:
                raise ValueError(f"data of {stage.name} are missing; give --data-align and --data-instruct")

    def runs(self) -> list[Run]:
        """All of them, seed by seed, so that one that is interrupted has whole seeds.

        Raises: ValueError for a scale factor that a projector cannot honour on the encoder's patch grid.
        """
        pairs = [
            (name, scale_factor)
            for name in self.projectors or projectors.available()
            for scale_factor in self._honoured(name)
        ]
        return [Run(projector=name, scale_factor=scale, seed=seed) for seed in self.seeds for name, scale in pairs]

    @property
    def is_tested(self) -> bool:
        """Whether the models can be asked test questions: those of the recipes that learn from generated scenes."""
        return self._templates[1].data.scenes is not None

    def stages(self, run: Run) -> tuple[TrainingConfig, TrainingConfig]:
        """The configs of both stages; the second one's `model.start` is for the caller to put in."""
        align, instruct = (self._stage(template, run) for template in self._templates)
        return align, instruct

    def projector(self, run: Run) -> ProjectorConfig:
        """The run's projector, with the widths of the model that it is trained in."""
        return model_config(self.stages(run)[0].model).projector

    @property
    def protocol(self) -> str:
        """Digest of all that is the same for every run: rows of one table have the same."""
        common = [_decisive(template) for template in self._templates]
        for content in common:
            for key in ("seed", "scale_factors"):
                content.pop(key, None)
            del content["model"]["projector"]
        parts = [self.vision_tower or "", self.language_model or ""] if not self.foundation else [self.foundation]
        return _digest([VERSION, common, parts, ASKED if self.is_tested else [], self.limit, self.quick])

    def fingerprint(self, run: Run) -> str:
        """Digest of all that decides what a run computes."""
        stages = [_decisive(stage) for stage in self.stages(run)]
        return _digest([self.protocol, dataclasses.asdict(run), stages])

    @cached_property
    def patch_grid(self) -> tuple[int, int]:
        """(rows, cols) of the encoder."""
        return model_config(self._templates[0].model).patch_grid

    @cached_property
    def _templates(self) -> tuple[TrainingConfig, TrainingConfig]:
        """Both stages as the recipes have them, with this comparison's parts, steps and data."""
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
        """A projector as the recipe would have it: heads as those of its own, all else as its paper has it.

        Learned queries and positions are laid out for this encoder's patch grid.
        """
        name, own = _parse(variant)
        rows, cols = self.patch_grid
        fitting = {
            "scale_factor": scale_factor,
            "query_grid": [-(-rows // scale_factor), -(-cols // scale_factor)],
            "position_grid": [rows, cols],
        }
        heads = self._templates[0].model.projector.get("num_heads")
        fitting |= {} if heads is None else {"num_heads": heads}
        fields = {field.name for field in dataclasses.fields(_config({"name": name}))}
        return {"name": name} | {key: value for key, value in fitting.items() if key in fields} | own

    def _honoured(self, variant: str) -> list[int]:
        """The scale factors to train a projector at: 1 alone for one that keeps every token."""
        depends = self._settings(variant, 1) != self._settings(variant, 2)
        if not depends and _config(self._settings(variant, 1)).token_grid(self.patch_grid) == self.patch_grid:
            return [1]
        for scale_factor in self.scale_factors:
            _config(self._settings(variant, scale_factor)).token_grid(self.patch_grid, scale_factor)
        return list(self.scale_factors)


def _parse(variant: str) -> tuple[str, dict[str, Any]]:
    """A projector's name and the settings behind it; values are JSON, and text where they are not."""
    name, *settings = variant.split(":")
    parsed: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (key and equals and value):
            raise ValueError(f"projector {variant!r}: {setting!r} must be KEY=VALUE, as in resampler:num_heads=2")
        try:
            parsed[key] = json.loads(value)
        except ValueError:
            parsed[key] = value
    return name, parsed


def _config(settings: dict[str, Any]) -> ProjectorConfig:
    return config_from_dict({"vision_dim": ANY_WIDTH, "language_dim": ANY_WIDTH, **settings})


def _decisive(config: TrainingConfig) -> dict[str, Any]:
    """What decides what a training run computes, without what may be elsewhere or otherwise when it is called again.

    Options that are off are left out, so that rows stay valid when another version knows more options.
    """
    content = config.to_dict()
    for setting in MAY_CHANGE:
        part, _, key = setting.rpartition(".")
        del (content[part] if part else content)[key]
    return _without_what_is_off(content)


def _without_what_is_off(content: dict[str, Any]) -> dict[str, Any]:
    parts = {key: _without_what_is_off(value) if isinstance(value, dict) else value for key, value in content.items()}
    return {key: value for key, value in parts.items() if value or (value == 0 and value is not False)}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
