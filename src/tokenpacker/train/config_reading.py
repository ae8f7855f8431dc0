"""A training run's config from plain values: of a file, of another config, and of single settings by dotted keys."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tokenpacker.train.config import TrainingConfig


def changed(config: TrainingConfig, settings: Iterable[str]) -> TrainingConfig:
    """The config with settings like `optimizer.learning_rate=1e-4` put in; values are read as YAML.

    Raises:
        ValueError: for a setting without `=`, an unknown key (naming the nearest), and a value of another type.
    """
    import yaml

    content = config.to_dict()
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting} has no '='; write for example optimizer.learning_rate=1e-4")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {setting} is no value ({' '.join(str(error).split())})") from None
        _put(content, key.strip().split("."), value, key)
    return from_dict(content)


def merged(config: TrainingConfig, content: Mapping[str, Any]) -> TrainingConfig:
    """The config with the given values in place of its own, at any depth. Raises ValueError as `from_dict`."""
    return from_dict(_merge(config.to_dict(), content))


def read_config(path: Path) -> dict[str, Any]:
    """The content of a YAML or JSON file. Raises ValueError where it is missing, damaged or no mapping."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML or JSON ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no settings; write keys and values, as `--dry-run --json` prints them")
    return content


def from_dict(content: Mapping[str, Any]) -> TrainingConfig:
    """The config of plain values. Raises ValueError for unknown keys and values of another type."""
    return _build(TrainingConfig, content, "")


def _build(kind: Any, content: Any, where: str) -> Any:
    if not isinstance(content, Mapping):
        raise ValueError(f"{where.rstrip('.') or 'config'}={content!r} must be a set of keys and values")
    hints = get_type_hints(kind)
    _refuse_unknown(content, hints, where)
    values = {key: _convert(hints[key], value, f"{where}{key}") for key, value in content.items()}
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where}{missing[0]} is missing; give it a value")
    return kind(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """The value as its type wants it: lists to tuples, whole numbers to floats, mappings to configs."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(argument for argument in arguments if argument is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{where}.")
    if origin is tuple and isinstance(value, (list, tuple)):
        if Ellipsis not in arguments and len(value) != len(arguments):
            raise ValueError(f"{where}={value!r} must have {len(arguments)} values")
        return tuple(_convert(arguments[0], entry, where) for entry in value)
    if origin is dict and isinstance(value, Mapping):
        return {
            key: entry if arguments[1] is Any else _convert(arguments[1], entry, f"{where}.{key}")
            for key, entry in value.items()
        }
    if origin is Literal and value in arguments:
        return value
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4 as text
        except ValueError:
            pass
    if hint in (str, bool, int) and type(value) is hint:
        return value
    expected = " or ".join(map(repr, arguments)) if origin is Literal else getattr(hint, "__name__", str(hint))
    raise ValueError(f"{where}={value!r} must be {expected}")


def _put(content: dict[str, Any], keys: list[str], value: Any, whole: str) -> None:
    for depth, key in enumerate(keys[:-1]):
        if content.get(key) is None and key in content:
            content[key] = {}
        if not isinstance(content.get(key), dict):
            _refuse_unknown({key: None}, content, ".".join([*keys[:depth], ""]))
            raise ValueError(f"--set {whole}: {key} has no keys of its own")
        content = content[key]
    content[keys[-1]] = value


def _merge(content: dict[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(content)
    for key, value in other.items():
        nested = isinstance(value, Mapping) and isinstance(result.get(key), dict) and key != "projector"
        result[key] = _merge(result[key], value) if nested else value
    return result


def _refuse_unknown(given: Iterable[str], known: Iterable[str], where: str) -> None:
    valid = list(known)
    for key in given:
        if key not in valid:
            near = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.5)
            hint = f"did you mean {where}{near[0]}?" if near else f"use one of {', '.join(valid)}"
            raise ValueError(f"{where}{key} is no setting; {hint}")
