"""The configuration of a complete model: vision tower, projector, language model, and the vision levels in use."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from tokenpacker.projectors import ProjectorConfig, config_from_dict
from tokenpacker.regions import RegionConfig

# Options of language models whose heads do more than one linear layer; their logits would silently be wrong here.
UNSUPPORTED_HEAD_OPTIONS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class TokenPackerConfig(PreTrainedConfig):
    """Configuration of `TokenPackerForConditionalGeneration`.

    Args:
        vision_config: config (or its dict) of any transformers ViT with `hidden_size`, `num_hidden_layers`,
            `image_size` and `patch_size`.
        text_config: config (or its dict) of any decoder-only language model.
        multi_modal_projector_config: dict of a registered projector, such as `{"name": "token-packer",
            "scale_factor": 2}`. The widths and the number of levels are taken from the other arguments and need not be
            given. `projector_config` is its short name, and its name in older files.
        vision_levels: hidden states that keys and values come from, 1 being the first layer's output; negative
            numbers count from the last layer's output, which is -1. None spreads four levels as the paper does.
        vision_query_level: hidden state that the coarse query comes from; None takes the last of `vision_levels`.
        image_token_id: id of the placeholder that packed tokens replace.
        region_config: dict of the region encoder, in which the model's widths need not be given, so `{}` will do; None
            for a model that does not know regions.
        region_token_id: id of the placeholder that region tokens replace; needed with `region_config`.
        keep_spare_vision_layers: keep the tower's layers above the last used level, without running them. They are
            needed to export a converted model to its original format.
        released: the origin of a converted model: its original config and the content of its files, for the export.

    Raises:
        ValueError: for levels that do not exist, and for a projector or region config that does not fit.
    """

    model_type = "tokenpacker"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012 - transformers' convention
    attribute_map = {"projector_config": "multi_modal_projector_config"}  # noqa: RUF012 - transformers' convention

    def __init__(
        self,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        multi_modal_projector_config: dict[str, Any] | None = None,
        vision_levels: list[int] | None = None,
        vision_query_level: int | None = None,
        image_token_id: int = 32000,
        region_config: dict[str, Any] | None = None,
        region_token_id: int | None = None,
        keep_spare_vision_layers: bool = False,
        released: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        self.vision_config = _sub_config(vision_config, "clip_vision_model")
        self.text_config = _sub_config(text_config, "llama")
        num_layers = self.vision_config.num_hidden_layers
        levels = paper_levels(num_layers) if vision_levels is None else vision_levels
        self.vision_levels = [_resolve_level(level, num_layers) for level in levels]
        query_level = levels[-1] if vision_query_level is None else vision_query_level
        self.vision_query_level = _resolve_level(query_level, num_layers)
        self.image_token_id = image_token_id
        self.keep_spare_vision_layers = keep_spare_vision_layers
        self.released = released
        short = kwargs.pop("projector_config", None)
        if short is not None and multi_modal_projector_config is not None:
            raise ValueError("projector_config is a short name of multi_modal_projector_config; pass one of the two")
        projector = multi_modal_projector_config or short or {"name": "token-packer"}
        self._check_widths("multi_modal_projector_config", projector)
        self.multi_modal_projector_config = config_from_dict(projector | self._widths).to_dict()
        self.region_config: dict[str, Any] | None = None
        self.region_token_id = region_token_id
        if region_config is not None:
            self.set_regions(region_token_id, region_config)
        for option in UNSUPPORTED_HEAD_OPTIONS:
            if getattr(self.text_config, option, None) not in (None, 1, 1.0):
                raise ValueError(
                    f"{self.text_config.model_type} sets {option}={getattr(self.text_config, option)}, which scales its"
                    " logits; only language models with a plain linear head are supported"
                )
        kwargs.setdefault("tie_word_embeddings", getattr(self.text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)

    def set_regions(self, region_token_id: int | None, region_config: dict[str, Any] | None = None) -> None:
        """Adds a region encoder to the config, and the id of its placeholder.

        Raises:
            ValueError: for an id that is missing or taken, and for a region config that does not fit.
        """
        if type(region_token_id) is not int or region_token_id == self.image_token_id:
            raise ValueError(
                f"region_token_id={region_token_id!r} with a region_config; give the id of <mask>, another than"
                f" image_token_id={self.image_token_id}"
            )
        unknown = sorted(set(region_config or {}) - set(self._widths))
        if unknown:
            raise ValueError(f"region_config has the unknown key {unknown[0]!r}; it has {', '.join(self._widths)}")
        self._check_widths("region_config", region_config or {})
        self.region_config = RegionConfig(**self._widths).to_dict()
        self.region_token_id = region_token_id

    def _check_widths(self, name: str, given: dict[str, Any]) -> None:
        for key, value in self._widths.items():
            if given.get(key, value) != value:
                raise ValueError(f"{name} has {key}={given[key]} but the model's parts need {value}")

    @property
    def _widths(self) -> dict[str, int]:
        """Widths that the projector and the region encoder must have."""
        return {
            "vision_dim": self.vision_config.hidden_size,
            "language_dim": self.text_config.hidden_size,
            "num_levels": len(self.vision_levels),
        }

    @property
    def projector(self) -> ProjectorConfig:
        """The projector's own config, which counts tokens without weights."""
        return config_from_dict(self.multi_modal_projector_config)

    @property
    def regions(self) -> RegionConfig | None:
        """The region encoder's own config; None for a model without one."""
        return None if self.region_config is None else RegionConfig(**self.region_config)

    @property
    def num_vision_layers(self) -> int:
        """The number of the tower's layers that run: up to the last level that is used."""
        return max(*self.vision_levels, self.vision_query_level)

    @property
    def tile_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the images that the vision tower reads."""
        return _pair(self.vision_config.image_size)

    @property
    def patch_size(self) -> tuple[int, int]:
        """(height, width) in pixels of one patch."""
        return _pair(self.vision_config.patch_size)

    @property
    def patch_grid(self) -> tuple[int, int]:
        """(rows, cols) of patches in one tile."""
        (height, width), (patch_height, patch_width) = self.tile_size, self.patch_size
        return height // patch_height, width // patch_width


def paper_levels(num_layers: int) -> list[int]:
    """Four levels placed as 12, 16, 22, 23 of CLIP-L's 24 layers; the very last layer is left out, as in the paper."""
    if num_layers < 8:  # fewer would name one level twice
        raise ValueError(f"a vision tower of {num_layers} layers has no default levels; pass vision_levels")
    return [round(num_layers / 2), round(num_layers * 2 / 3), num_layers - 2, num_layers - 1]


def _sub_config(config: PreTrainedConfig | dict[str, Any] | None, default_type: str) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    values = dict(config or {})
    return AutoConfig.for_model(values.pop("model_type", default_type), **values)


def _resolve_level(level: int, num_layers: int) -> int:
    resolved = level + num_layers + 1 if level < 0 else level
    if not 1 <= resolved <= num_layers:
        raise ValueError(f"vision level {level} does not exist; the tower has layers 1 to {num_layers}")
    return resolved


def _pair(value: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
