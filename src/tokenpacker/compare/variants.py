"""Projectors as a command line names them, with settings behind them."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from tokenpacker.projectors import ProjectorConfig, config_from_dict

ANY_WIDTH = 128  # of a config that is only asked for its fields and its token count
WORDS = {"True": True, "False": False, "None": None}  # as Python writes them; JSON has them in small letters


def parse_variant(variant: str) -> tuple[str, dict[str, Any]]:
    """A projector's name and its settings; a value that is not JSON is text. Raises ValueError without a value."""
    name, *settings = variant.split(":")
    parsed: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (key and equals and value):
            raise ValueError(f"projector {variant!r}: {setting!r} must be KEY=VALUE, as in resampler:num_heads=2")
        try:
            parsed[key] = WORDS[value] if value in WORDS else json.loads(value)
        except ValueError:
            parsed[key] = value
    return name, parsed


def variant_config(settings: dict[str, Any]) -> ProjectorConfig:
    """The config of these settings, for widths of any size where they are not given.

    Raises:
        ValueError: for unknown settings, and for one that is not true or false where it should be.
    """
    config = config_from_dict({"vision_dim": ANY_WIDTH, "language_dim": ANY_WIDTH, **settings})
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(field.default, bool) and not isinstance(value, bool):
            raise ValueError(f"{field.name}={value!r} of {config.name} must be true or false")
    return config
