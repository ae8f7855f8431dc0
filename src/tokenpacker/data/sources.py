"""The one door to the data of a training run: from its config to its batches.

Data come from files (`FileBatches`), streams (`StreamBatches`) or generated scenes (`scenes.steps.Steps`). All three
are data sets whose item `i` is one device's batch, made from the config and `i` alone. The functions here take what
they need out of the config; nothing behind them sees it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch.utils.data import Dataset

from tokenpacker.data.batches import BatchMaker, FileBatches, StreamBatches
from tokenpacker.data.index import Lengths, index_lengths
from tokenpacker.data.plan import Planner, RunPlan, draw_held_out, fill, plan_run
from tokenpacker.data.records import Format, Records, check_files, open_records
from tokenpacker.data.rejects import Rejects
from tokenpacker.data.samples import SampleMaker
from tokenpacker.data.streams import TAR_ENDINGS, Stream, open_hub_dataset, open_shards
from tokenpacker.hf.processing.processor import TokenPackerProcessor
from tokenpacker.scenes.steps import Steps, StepSpec

if TYPE_CHECKING:
    from tokenpacker.train.config import TrainingConfig

INDEX, REJECTS, HELD_OUT_REJECTS = "index", "rejects.jsonl", "held_out_rejects.jsonl"


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Samples whose loss is measured during a run that is not trained on them.

    Args:
        batches: the same at each time.
        facts: JSON values that tell which samples these are.
    """

    batches: FileBatches
    facts: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Source:
    """The batches of a whole run.

    Args:
        batches: one device's batch each.
        num_steps: optimizer steps of the run.
        samples_per_step: mean; None if not known.
        fingerprint: differs if the batches differ.
        facts: about the data, for the model card.
        held_out: samples to measure the loss on; None if there are none.
    """

    batches: Dataset[dict[str, Any]]
    num_steps: int
    fingerprint: str
    facts: Mapping[str, str]
    samples_per_step: float | None = None
    held_out: HeldOut | None = None


@dataclass(frozen=True)
class RunData:
    """The measured records of data files, and the plan of a run on them.

    Args:
        held_out: numbers of the usable records that the plan leaves out.
    """

    records: Records
    maker: SampleMaker
    lengths: Lengths
    planner: Planner
    plan: RunPlan
    rejects: Rejects
    held_out: np.ndarray

    @property
    def trained(self) -> np.ndarray:
        """Numbers of the records that are trained on."""
        return np.setdiff1d(self.lengths.usable, self.held_out)


def open_source(
    config: TrainingConfig,
    processor: TokenPackerProcessor,
    output: Path,
    *,
    position: dict[str, Any] | None = None,
    progress: bool = False,
) -> Source:
    """The source of a run.

    Args:
        output: folder of the run, for the index of the data and the rejects.
        position: of a stream, from a checkpoint.

    Raises:
        ValueError: for data that are missing or do not fit.
        ImportError: for formats whose library is missing.
        TooManyRejects: if too much of the data is bad.
    """
    check_source(config)
    if config.data.scenes is not None:
        source = _scenes(config, processor)
    elif is_stream(config):
        source = _stream(config, processor, output, position)
    else:
        source = _files(config, processor, output, progress)
    path = config.evaluation.held_out
    if path is None:
        return source
    other = held_out_config(config)
    data = look_through(other, processor, output, progress, rejects=HELD_OUT_REJECTS)
    digest = hashlib.sha256((source.fingerprint + _digest(data.lengths).hexdigest()).encode())
    facts = {"file": path, "samples": len(data.lengths.usable)}
    found = _held_out(other, processor, output, data, data.lengths.usable, facts)
    return dataclasses.replace(source, fingerprint=digest.hexdigest(), held_out=found)


def check_source(config: TrainingConfig) -> None:
    """Raises the errors of `open_source` that settings and names of files tell. Opens and fetches nothing."""
    data = config.data
    if data.scenes is not None:
        for name in ("path", "images", "format"):
            if getattr(data, name) is not None:
                raise ValueError(
                    f"data.{name} and data.scenes exclude each other; set data.scenes=null for data of your own"
                )
        if config.batch_size != 1 or not config.scale_factors:
            raise ValueError("data.scenes needs batch_size=1 (a batch is a step) and scale_factors")
        _require_steps(config, "generated scenes have no end")
    elif data.path is None:
        raise ValueError("data.path is missing; give the data file, shards or a hub id with --data")
    elif is_stream(config):
        _require_steps(config, "a stream does not tell its length")
        if data.format != "hub":
            open_data(data.path, data.images, format=data.format)
    else:
        check_files(data.path, data.images, format=_file_format(config))
    _check_held_out(config)


def same_beginning(source: Source, other: Source, num_steps: int) -> bool:
    """Whether two sources that differ in length alone have the same batches in their first steps."""
    mine, theirs = source.batches, other.batches
    if isinstance(mine, FileBatches) and isinstance(theirs, FileBatches):
        num_batches = num_steps * mine.plan.batches_per_step
        return mine.plan.batches[:num_batches] == theirs.plan.batches[:num_batches]
    if isinstance(mine, Steps) and isinstance(theirs, Steps):
        ends = [steps.spec.one_tile_share * steps.num_steps for steps in (mine, theirs)]
        return ends[0] == ends[1] or min(ends) >= num_steps
    return True


def look_through(
    config: TrainingConfig,
    processor: TokenPackerProcessor,
    output: Path | None,
    progress: bool = False,
    *,
    rejects: str = REJECTS,
) -> RunData:
    """The records of data files with the length of every sample; decodes none. Raises the errors of `open_source`.

    Args:
        rejects: name of the file in `output` for those that cannot be used.
    """
    data = config.data
    records = open_data(data.path or "", data.images, format=data.format)
    assert isinstance(records, Records)
    maker, planner = _batch_maker(config, processor, output, rejects=rejects), _planner(config)
    lengths = index_lengths(
        records,
        maker.maker,
        scale_factor=maker.longest_scale_factor,
        rejects=maker.rejects,
        cache=output / INDEX if output else None,
        progress=progress,
    )
    maker.rejects.finish()
    held_out = draw_held_out(lengths.usable, config.evaluation.held_out_share, config.seed)
    trained = lengths.tokens.copy()
    trained[held_out] = 0
    plan = plan_run(planner, trained, lengths.tiles, epochs=config.epochs, max_steps=config.max_steps)
    return RunData(records, maker.maker, lengths, planner, plan, maker.rejects, held_out)


def is_stream(config: TrainingConfig) -> bool:
    """Whether the data can only be read in order."""
    if config.data.format is not None:
        return config.data.format in ("webdataset", "hub")
    return config.data.path is not None and _is_tar(config.data.path)


def open_data(
    data: str | Path | Sequence[str | Path],
    images_root: str | Path | None = None,
    *,
    format: str | None = None,
    seed: int = 0,
) -> Records | Stream:
    """Records by number; for tar shards and hub data sets a stream.

    Args:
        format: None tells tar shards and data files by their names.

    Raises:
        ValueError: for data that are missing or cannot be read in this format.
    """
    if format == "hub":
        return open_hub_dataset(str(data), images_root, seed=seed)
    paths = [data] if isinstance(data, (str, Path)) else data
    if format == "webdataset" or (format is None and all(_is_tar(path) for path in paths)):
        if images_root is not None:
            raise ValueError(
                f"images_root={images_root} has no use with tar shards, which hold their images; leave --images out"
            )
        return open_shards(paths, seed=seed)
    return open_records(data, images_root, format=cast(Format | None, format))


def _is_tar(path: str | Path) -> bool:
    """Whether a file is a tar shard by its name, or a folder holds one."""
    path = Path(path)
    names = [entry.name for entry in path.iterdir()] if path.is_dir() else [path.name]
    return any(name.endswith(TAR_ENDINGS) for name in names)


def _files(config: TrainingConfig, processor: TokenPackerProcessor, output: Path, progress: bool) -> Source:
    data = look_through(config, processor, output, progress)
    digest = _digest(data.lengths)
    digest.update(json.dumps(data.plan.batches).encode())
    maker = _batch_maker(config, processor, output, num_samples=len(data.lengths.usable))
    found, rows = None, data.held_out.tolist()
    if rows:
        facts = {"share": config.evaluation.held_out_share, "samples": len(rows), "rows": rows}
        found = _held_out(config, processor, output, data, data.held_out, facts)
    return Source(
        batches=FileBatches(data.plan, data.records, maker),
        num_steps=data.plan.num_steps,
        samples_per_step=data.plan.samples_per_step,
        fingerprint=digest.hexdigest(),
        facts={
            "data": str(config.data.path),
            "samples used": f"{len(data.trained):,} of {len(data.records):,}",
            "places that held a token": f"{data.plan.fill:.1%}",
        },
        held_out=found,
    )


def _held_out(
    config: TrainingConfig,
    processor: TokenPackerProcessor,
    output: Path,
    data: RunData,
    numbers: np.ndarray,
    facts: Mapping[str, Any],
) -> HeldOut:
    """Some of the records in batches, each record once."""
    tokens = np.zeros_like(data.lengths.tokens)
    tokens[numbers] = data.lengths.tokens[numbers]
    batches = data.planner.plan(tokens, data.lengths.tiles, 0)
    plan = RunPlan(batches, data.planner.batches_per_step, fill(batches, tokens))
    maker = _batch_maker(config, processor, output, rejects=HELD_OUT_REJECTS)
    return HeldOut(batches=FileBatches(plan, data.records, maker), facts=facts)


def held_out_config(config: TrainingConfig) -> TrainingConfig:
    """The config with the held-out file as its data, for one epoch."""
    evaluation = config.evaluation
    images = evaluation.held_out_images or config.data.images
    data = dataclasses.replace(config.data, path=evaluation.held_out, images=images, format=None, scenes=None)
    return dataclasses.replace(config, data=data, epochs=1.0, max_steps=None)


def _check_held_out(config: TrainingConfig) -> None:
    """Raises ValueError if what is to be held out cannot be."""
    evaluation, data = config.evaluation, config.data
    if evaluation.held_out_share and (data.scenes is not None or is_stream(config)):
        kind = "generated scenes have" if data.scenes is not None else "a stream has"
        raise ValueError(
            f"evaluation.held_out_share={evaluation.held_out_share:g} needs rows by number, and {kind} none; give"
            " evaluation.held_out=FILE, or evaluation.tasks"
        )
    path = evaluation.held_out
    if path is None:
        return
    if _is_tar(path):
        raise ValueError(
            f"evaluation.held_out={path} holds tar shards, which cannot be read by number; give a JSON, JSONL or"
            " Parquet file"
        )
    try:
        files = check_files(path, held_out_config(config).data.images)
    except ValueError as error:
        raise ValueError(f"evaluation.held_out: {error}") from None
    trained = (
        []
        if data.scenes is not None or is_stream(config)
        else check_files(data.path or "", format=_file_format(config))
    )
    shared = {file.resolve() for file, _ in files} & {file.resolve() for file, _ in trained}
    if shared:
        raise ValueError(f"evaluation.held_out names {min(shared)}, which is trained on; give another file")


def _file_format(config: TrainingConfig) -> Format | None:
    return cast(Format | None, config.data.format)


def _digest(lengths: Lengths) -> Any:
    return hashlib.sha256(lengths.tokens.tobytes() + lengths.tiles.tobytes())


def _stream(
    config: TrainingConfig, processor: TokenPackerProcessor, output: Path, position: dict[str, Any] | None
) -> Source:
    data, num_steps = config.data, config.max_steps
    stream = open_data(data.path or "", data.images, format=data.format, seed=config.seed)
    assert isinstance(stream, Stream)
    assert num_steps is not None, "check_source requires it"
    planner, maker = _planner(config), _batch_maker(config, processor, output)
    return Source(
        batches=StreamBatches(stream, maker, planner, num_steps * planner.batches_per_step, position),
        num_steps=num_steps,
        fingerprint=stream.start()["stream"],
        facts={"data": str(data.path), "shards": f"{len(stream.shards):,}, read in order"},
    )


def _scenes(config: TrainingConfig, processor: TokenPackerProcessor) -> Source:
    images, scenes, num_steps = processor.image_processor, config.data.scenes, config.max_steps
    assert scenes is not None
    assert num_steps is not None, "check_source requires it"
    spec = StepSpec(
        show="pixels",
        captions=scenes.captions,
        one_tile_share=scenes.one_tile_share,
        paced_at=scenes.paced_at,
        scale_factors=config.scale_factors,
        mixed_share=config.mixed_share,
        max_tiles=images.max_tiles,
        tile_size=images.tile_size,
        patch_size=images.tile_size[0] // processor.patch_grid[0],
        regions=scenes.regions,
    )
    decisive = dataclasses.asdict(spec)
    for name in ("regions", "mixed_share"):  # so that runs resume that began before these were there
        if not decisive[name]:
            del decisive[name]
    return Source(
        batches=Steps(spec, processor.tokenizer, num_steps=num_steps, seed=config.seed, processor=processor),
        num_steps=num_steps,
        fingerprint=hashlib.sha256(json.dumps([decisive, config.seed]).encode()).hexdigest(),
        facts={"data": f"easy-VQA{', regions' if spec.regions else ''} and fine print, drawn while training"},
    )


def _require_steps(config: TrainingConfig, why: str) -> None:
    if config.max_steps is None:
        raise ValueError(f"max_steps is missing, and {why}; give it with --set max_steps=1000")


def _planner(config: TrainingConfig) -> Planner:
    data = config.data
    return Planner(
        rows=config.device_batch_size,
        max_length=data.max_length,
        max_tiles=data.max_tiles_per_batch,
        batches_per_step=config.batch_size // config.device_batch_size,
        packed=data.packed,
        grouped=data.grouped,
        seed=config.seed,
    )


def _batch_maker(
    config: TrainingConfig,
    processor: TokenPackerProcessor,
    output: Path | None,
    *,
    rejects: str = REJECTS,
    num_samples: int | None = None,
) -> BatchMaker:
    data, format = config.data, config.model.chat_format
    samples = SampleMaker(processor, format, data.max_length, max_tiles=data.max_tiles_per_batch)
    left_out = Rejects(output / rejects if output else None, data.max_reject_share, num_samples=num_samples)
    factors: dict[str, Any] = {"scale_factors": config.scale_factors, "mixed_share": config.mixed_share}
    return BatchMaker(samples, left_out, packed=data.packed, seed=config.seed, **factors)
