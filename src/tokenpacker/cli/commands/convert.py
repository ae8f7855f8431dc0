"""`tokenpacker convert`: checkpoints from the original layout to ours, and back."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument

from tokenpacker.cli import options
from tokenpacker.cli.arguments import in_range, refuse, require_free
from tokenpacker.cli.errors import keeping
from tokenpacker.cli.loading import quiet
from tokenpacker.cli.options import flag, number, value
from tokenpacker.cli.output import print_note, print_result
from tokenpacker.hub import fetch
from tokenpacker.progress import Progress

Layout = Literal["tokenpacker", "original", "stage-1"]
Dtype = Literal["float32", "float16", "bfloat16"]
Variant = Literal["slow", "slow_legacy", "fast"]
WeightFormat = Literal["bin", "safetensors"]
FROM, TO = "From the original layout", "To the original layout"  # panels of `--help`


def convert(
    src: Annotated[str, Argument(metavar="SRC", help="Folder or hub id of the checkpoint.")],
    dst: Annotated[Path, Argument(metavar="DST", help="Folder to write; it appears when it is complete.")],
    to: Annotated[Layout, value("FORMAT", "original, or stage-1 for mm_projector.bin.")] = "tokenpacker",
    vision_tower: Annotated[str | None, value("MODEL", "Tower to take.", "the checkpoint's")] = None,
    dtype: Annotated[Dtype | None, value("TYPE", "float32, float16 or bfloat16.", "as stored")] = None,
    max_shard_gb: Annotated[float | None, value("GB", "Largest weight file.", "4.3", callback=in_range(0.001))] = None,
    overwrite: Annotated[bool, flag("--overwrite", "Replace DST, once the new folder is complete.")] = False,
    base: Annotated[str | None, value("MODEL", "Language model of a stage-1 or LoRA checkpoint.", panel=FROM)] = None,
    keep_adapter: Annotated[bool, flag("--keep-adapter", "Keep a LoRA adapter, in DST/adapter.", FROM)] = False,
    max_tiles: Annotated[int | None, number("Most tiles.", "patch_num, or 9", FROM)] = None,
    tokenizer_variant: Annotated[
        Variant | None, value("NAME", "slow, slow_legacy or fast.", "as trained", FROM)
    ] = None,
    revision: Annotated[str | None, value("NAME", "Branch, tag or commit on the hub.", "main", FROM)] = None,
    weights: Annotated[WeightFormat | None, value("FORMAT", "bin or safetensors.", "bin", TO)] = None,
    tokenizer: Annotated[Path | None, value("FOLDER", "Folder of tokenizer.model.", "the model's", TO)] = None,
    as_json: options.Json = False,
) -> None:
    """Convert checkpoints of the original code, and write them back.

    Examples:
        tokenpacker convert sunshine-lwt/TokenPacker-HD-7b-9patch-144token packer-hd-7b --dtype bfloat16
        tokenpacker convert checkpoints/pretrain stage1 --base lmsys/vicuna-7b-v1.5
        tokenpacker convert packer-hd-7b back --to original
    """
    incoming = {"base": base, "max_tiles": max_tiles, "tokenizer_variant": tokenizer_variant, "revision": revision}
    outgoing = {"weights": weights, "tokenizer": tokenizer}
    useless: dict[str, Any] = outgoing if to == "tokenpacker" else incoming | {"keep_adapter": keep_adapter}
    if to == "stage-1":
        useless = useless | outgoing | {"max_shard_gb": max_shard_gb}
    named = {f"--{name.replace('_', '-')}": value for name, value in useless.items()}
    refuse(named, f"has no meaning with --to {to}; leave it out")
    require_free(dst, overwrite, src)
    fetch(src, ["config.json"], "give the folder or hub id of a checkpoint", revision)  # before anything is imported
    arguments: dict[str, Any] = {"vision_tower": vision_tower, "dtype": dtype, "overwrite": overwrite}
    if max_shard_gb is not None:
        arguments["shard_bytes"] = int(max_shard_gb * 1e9)
    if to == "tokenpacker":
        arguments |= incoming | {"merge": not keep_adapter}
    else:
        arguments |= {"layout": "stage-1" if to == "stage-1" else "complete", "tokenizer": tokenizer}
        arguments["weights"] = weights or "bin"
    done = _run(src, dst, to, arguments)
    for note in done["notes"]:
        print_note(f"note: {note}")
    text = f"{dst}: {done['tensors']} tensors, {done['bytes'] / 1e9:.2f} GB, from a {done['kind']} checkpoint"
    print_result(as_json, {"src": src, "dst": str(dst), "to": to, **done}, text)


def _run(src: str, dst: Path, to: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Converts, with a progress bar; Ctrl-C and signals leave nothing behind."""
    kept = keeping(f"nothing is kept, for {dst} appears when it is complete; call it again to start anew")
    shown = Progress(f"{src} to {dst}", written=lambda count: f"{count / 1e9:.2f} GB")
    with quiet(), kept, _stopped_by_signals(), shown:
        from tokenpacker import checkpoints

        convert = checkpoints.convert if to == "tokenpacker" else checkpoints.export_original
        return convert(src, dst, progress=lambda done, total: shown.update(done, total=total), **arguments)


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
