"""`tokenpacker convert`: checkpoints from the original layout to ours, and back."""

import contextlib
import signal
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from tokenpacker.cli.errors import keeping
from tokenpacker.cli.options import JsonOption
from tokenpacker.cli.output import print_json, print_note
from tokenpacker.hub import fetch
from tokenpacker.progress import Progress


class Target(str, Enum):
    """What `--to` can be."""

    tokenpacker = "tokenpacker"
    original = "original"
    stage_1 = "stage-1"


class Dtype(str, Enum):
    """What `--dtype` can be."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class TokenizerVariant(str, Enum):
    """What `--tokenizer-variant` can be."""

    slow = "slow"
    slow_legacy = "slow_legacy"
    fast = "fast"


class WeightFormat(str, Enum):
    """What `--weights` can be."""

    bin = "bin"
    safetensors = "safetensors"


def convert(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Folder or hub id of the checkpoint.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write; it appears when it is complete.")],
    to: Annotated[
        Target,
        typer.Option(
            "--to",
            help="tokenpacker: what transformers loads. original: the whole model in the original layout."
            " stage-1: mm_projector.bin of the original's first stage.",
        ),
    ] = Target.tokenpacker,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="FOLDER|HUB-ID",
            help="Language model that a stage-1 or LoRA checkpoint was trained from.",
            show_default="none",
        ),
    ] = None,
    vision_tower: Annotated[
        str | None,
        typer.Option(
            "--vision-tower",
            metavar="FOLDER|HUB-ID",
            help="Vision tower to take; with --to original, the name that the config gets.",
            show_default="the checkpoint's own",
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option("--dtype", help="Cast all weights on the way.", show_default="as they are, bit for bit"),
    ] = None,
    keep_adapter: Annotated[
        bool, typer.Option("--keep-adapter", help="Keep a LoRA adapter for PEFT in DST/adapter instead of merging it.")
    ] = False,
    max_tiles: Annotated[
        int | None,
        typer.Option("--max-tiles", metavar="N", help="Limit of tiles.", show_default="patch_num of the config, or 9"),
    ] = None,
    tokenizer_variant: Annotated[
        TokenizerVariant | None,
        typer.Option(
            "--tokenizer-variant",
            help="Which of the original's tokenizers to reproduce; they differ from the second turn on.",
            show_default="the one it was trained with",
        ),
    ] = None,
    weights: Annotated[
        WeightFormat | None,
        typer.Option("--weights", help="Format of the weights with --to original.", show_default="bin"),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer",
            metavar="FOLDER",
            help="With --to original: folder with tokenizer.model.",
            show_default="the one the model came with",
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit of SRC on the hub.", show_default="main")
    ] = None,
    max_shard_gb: Annotated[
        float | None,
        typer.Option(
            "--max-shard-gb",
            metavar="GB",
            min=0.001,
            help="Largest file of weights; as much is in memory.",
            show_default="4.3",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace DST, once the new folder is complete.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Convert a checkpoint of the original TokenPacker code, or write a model back in its layout.

    Weights are read file by file, so that memory holds a few gigabytes at most. Every tensor is accounted for.

    Examples:

        tokenpacker convert sunshine-lwt/TokenPacker-HD-7b-9patch-144token packer-hd-7b --dtype bfloat16

        tokenpacker convert checkpoints/pretrain stage1 --base lmsys/vicuna-7b-v1.5

        tokenpacker convert packer-hd-7b back --to original
    """
    from tokenpacker.cli.loading import quiet

    shared: dict[str, Any] = {
        "vision_tower": vision_tower,
        "dtype": dtype.value if dtype else None,
        "overwrite": overwrite,
    }
    if max_shard_gb is not None:
        shared["shard_bytes"] = int(max_shard_gb * 1e9)
    only_from_original = {
        "--base": base,
        "--keep-adapter": keep_adapter or None,
        "--max-tiles": max_tiles,
        "--tokenizer-variant": tokenizer_variant,
        "--revision": revision,
    }
    only_to_original = {"--weights": weights, "--tokenizer": tokenizer}
    if to is Target.tokenpacker:
        _refuse(only_to_original, "--to tokenpacker")
    else:
        _refuse(only_from_original, f"--to {to.value}")
    if to is Target.stage_1:
        _refuse(only_to_original | {"--max-shard-gb": max_shard_gb}, "--to stage-1")
    _require_free(dst, overwrite, src)
    fetch(src, ["config.json"], "give the folder or hub id of a checkpoint", revision)  # before anything is imported
    kept = keeping(f"nothing is kept, for {dst} appears when it is complete; call it again to start anew")
    with quiet(), kept, _stopped_by_signals(), Progress(f"{src} to {dst}", written=_gigabytes) as shown:
        from tokenpacker import checkpoints

        if to is Target.tokenpacker:
            done = checkpoints.convert(
                src,
                dst,
                base=base,
                merge=not keep_adapter,
                max_tiles=max_tiles,
                tokenizer_variant=tokenizer_variant.value if tokenizer_variant else None,
                revision=revision,
                progress=lambda done, total: shown.update(done, total=total),
                **shared,
            )
        else:
            done = checkpoints.export_original(
                src,
                dst,
                layout="stage-1" if to is Target.stage_1 else "complete",
                weights=weights.value if weights else "bin",
                tokenizer=tokenizer,
                progress=lambda done, total: shown.update(done, total=total),
                **shared,
            )
    for note in done["notes"]:
        print_note(f"note: {note}")
    if as_json:
        print_json({"src": src, "dst": str(dst), "to": to.value, **done})
    else:
        typer.echo(f"{dst}: {done['tensors']} tensors, {done['bytes'] / 1e9:.2f} GB, from a {done['kind']} checkpoint")


def _require_free(dst: Path, overwrite: bool, src: str) -> None:
    """Raises ValueError for a place that is taken, before anything is imported; the conversion looks more closely."""
    holds_src = Path(src).expanduser().resolve().is_relative_to(dst.expanduser().resolve())  # which has its own error
    taken = dst.exists() and not (dst.is_dir() and not any(dst.iterdir()))
    if taken and not overwrite and not holds_src:
        raise ValueError(f"{dst} exists already; choose another folder, or pass --overwrite")


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _refuse(options: dict[str, Any], target: str) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{given[0]} has no meaning with {target}; leave it out")


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Within the context, SIGTERM and SIGHUP end the command as Ctrl-C does: what was begun is removed."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
