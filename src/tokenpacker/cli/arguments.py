"""What is wrong with options by themselves, told before anything is imported, read or loaded."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenpacker.text import check_text, did_you_mean

AT_LEAST_1 = ("scale_factor", "max_image_tokens", "max_tiles", "limit", "max_regions", "max_length", "sample")
DEVICES = ("cpu", "cuda", "mps", "auto")
DTYPES = ("float32", "float16", "bfloat16", "4bit")


def check_arguments(options: dict[str, Any]) -> None:
    """Raises ValueError for options of any command that no model and no data could make right."""
    for value in options.values():
        for text in _texts(value):
            check_text(text, repr(text))  # of bytes that are no UTF-8; a file's name may hold them, too
    for name in AT_LEAST_1:
        value = options.get(name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be an integer of at least 1")
    if options.get("device") is not None:
        split_device(options["device"])
    if type(options.get("dtype")) is str:
        check_dtype(options["dtype"])


def require_existing(what: str, paths: Iterable[Path]) -> None:
    """Raises ValueError for a file or folder that is not there."""
    for path in paths:
        if not path.exists():
            raise ValueError(f"{what} {path} does not exist; check the path")


def require_projectors(names: Iterable[str]) -> None:
    """Raises ValueError for a projector that is not registered; settings may stand behind a name and a colon."""
    from tokenpacker.projectors import available

    known = available()
    for name in (name.partition(":")[0] for name in names):
        if name not in known:
            meant = did_you_mean(name, known)
            raise ValueError(f"projector {name!r} is unknown; use some of {', '.join(known)}{meant}")


def check_dtype(dtype: str) -> None:
    """Raises ValueError for a type that no weights are loaded as."""
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype} is unknown; use one of {', '.join(DTYPES)}")


def split_device(device: str) -> tuple[str, int | None]:
    """Kind and number of a device such as `cuda:1`. Raises ValueError for a kind that torch does not have."""
    kind, _, index = device.partition(":")
    if kind not in DEVICES or (index and not index.isdigit()):
        raise ValueError(f"--device {device} is unknown; use one of {', '.join(DEVICES)}, or cuda:1")
    return kind, int(index) if index else None


def _texts(value: Any) -> Iterator[str]:
    """All texts and paths of an option's value."""
    for one in value if isinstance(value, (list, tuple)) else [value]:
        if one is not None and not isinstance(one, (bool, int, float)):
            yield str(one)
