"""Checks of single options. They run while the command line is read, before anything is imported or loaded."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import typer

from tokenpacker.places import check_apart
from tokenpacker.text import did_you_mean

DEVICES = ("cpu", "cuda", "mps", "auto")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def in_range(least: float, most: float = math.inf) -> Callable[..., float | None]:
    """A typer callback that accepts `least` to `most`. The message of typer's own check lacks the value."""

    def check(param: typer.CallbackParam, value: float | None) -> float | None:
        if value is not None and not least <= value <= most:
            rule = f"be at least {least}" if most == math.inf else f"lie between {least} and {most}"
            raise ValueError(f"{param.opts[0]} {value} must {rule}")
        return value

    return check


def device_name(value: str | None) -> str | None:
    """A typer callback for `--device`."""
    if value is not None:
        split_device(value)
    return value


def split_device(device: str) -> tuple[str, int | None]:
    """Kind and number of a device such as `cuda:1`. Raises ValueError for a kind that torch does not have."""
    kind, _, index = device.partition(":")
    if kind not in DEVICES or (index and not index.isdigit()):
        raise ValueError(f"--device {device} is unknown; use one of {', '.join(DEVICES)}, or cuda:1")
    return kind, int(index) if index else None


def picture_file(param: typer.CallbackParam, value: Path | None) -> Path | None:
    """A typer callback for the file of a picture that is to be written."""
    if value is not None:
        check_picture(value, param.opts[0])
    return value


def check_picture(path: Path, option: str, *, in_folder: bool = False) -> None:
    """Raises ValueError if no picture can be written to `path`.

    Args:
        option: the name for the message.
        in_folder: whether the folder must be there already.
    """
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise ValueError(f"{option} {path} must end in {', '.join(PICTURE_SUFFIXES)}")
    if in_folder and not path.parent.is_dir():
        raise ValueError(f"{option} {path}: the folder {path.parent} does not exist; create it first")


def names(text: str) -> tuple[str, ...]:
    """The names in a text such as `mlp, ldp-v2`; commas in brackets belong to a name: `resampler:query_grid=[3,3]`."""
    return tuple(name.strip() for name in re.split(r",(?![^\[\]]*\])", text) if name.strip())


def whole_numbers(option: str, text: str, least: int = 1) -> tuple[int, ...]:
    """The numbers in a text such as `2,4`. Raises ValueError for anything else, and for numbers below `least`."""
    parts = names(text)
    if not parts or not all(part.isdigit() and int(part) >= least for part in parts):
        raise ValueError(f"{option} {text!r} must be whole numbers of at least {least} with commas between, as in 2,4")
    return tuple(map(int, parts))


def scale_factor(param: typer.CallbackParam, value: str | None) -> Any:
    """A typer callback for `--scale-factor` of commands that see the images."""
    return None if value is None else one_scale_factor(param.opts[0], value)


def one_scale_factor(option: str, text: str) -> int | Literal["auto"]:
    """A whole number of at least 1, or "auto". Raises ValueError for anything else."""
    if text == "auto":
        return "auto"
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"{option} {text} must be at least 1, or auto")
    return int(text)


def image_size(option: str, text: str) -> tuple[int, int]:
    """(height, width) of a text such as `2000x3000`. Raises ValueError for anything else."""
    match = re.fullmatch(r"([1-9]\d{0,8})\s*[xX×]\s*([1-9]\d{0,8})", text)
    if not match:
        raise ValueError(f"{option}: {text!r} is no size; write HEIGHTxWIDTH in pixels, for example 480x640")
    return int(match[1]), int(match[2])


def exclude(options: Mapping[str, object]) -> None:
    """Raises ValueError if more than one of the options was given."""
    given = [name for name, value in options.items() if value not in (None, False)]
    if len(given) > 1:
        raise ValueError(f"{given[0]} and {given[1]} exclude each other; leave one out")


def refuse(options: Mapping[str, object], reason: str) -> None:
    """Raises ValueError for the first of the options that was given. The message is its name and `reason`."""
    for name, value in options.items():
        if value is not None and value is not False:  # 0 is a value
            raise ValueError(f"{name} {reason}")


def require_free(folder: Path, overwrite: bool, source: str) -> None:
    """Raises ValueError for a folder to write that is taken, or holds `source`, which is read.

    What writes it looks more closely.
    """
    folder = folder.expanduser()
    check_apart(folder, [source])
    taken = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    if taken and not overwrite:
        raise ValueError(f"{folder} exists already; choose another folder, or pass --overwrite")


def require_projectors(projectors: Iterable[str]) -> None:
    """Raises ValueError for a projector that is not registered; settings may follow a name and a colon."""
    from tokenpacker.projectors import available

    known = available()
    for name in (name.partition(":")[0] for name in projectors):
        if name not in known:
            meant = did_you_mean(name, known)
            raise ValueError(f"projector {name!r} is unknown; use some of {', '.join(known)}{meant}")
