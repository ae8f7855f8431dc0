"""What a run learns from: data files, streams and generated scenes, each as device batches by number.

Item `i` of a source is one device's batch, made from the config and `i` alone, whoever asks for it: so steps hold the
same samples on any number of processes, and a resumed run goes on with the next item.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from tokenpacker.data.batches import BatchMaker, RunBatches, RunPlan, planned_lengths
from tokenpacker.data.index import Lengths, index_lengths
from tokenpacker.data.records import Records, check_files, open_records
from tokenpacker.data.rejects import Rejects
from tokenpacker.data.samples import SampleMaker
from tokenpacker.data.stream_batches import StreamBatches
from tokenpacker.data.streams import TAR_ENDINGS, Stream, open_hub_dataset, open_shards
from tokenpacker.hf.processing.processor import TokenPackerProcessor
from tokenpacker.scenes.steps import Steps, StepSpec
from tokenpacker.train.config import ScenesConfig, TrainingConfig

INDEX, REJECTS = "index", "rejects.jsonl"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Batches of a whole run.

    Args:
        batches: one device's batch each.
        num_steps: optimizer steps that they make.
        samples_per_step: on average, where that is known.
        fingerprint: another one means other batches.
        facts: what the model card says of the data.
    """

    batches: Dataset[dict[str, Any]]
    num_steps: int
    fingerprint: str
    facts: Mapping[str, str]
    samples_per_step: float | None = None


@dataclass(frozen=True)
class RunData:
    """Records of data files, looked through but not decoded."""

    records: Records
    maker: SampleMaker
    lengths: Lengths
    plan: RunPlan
    rejects: Rejects


def open_source(
    config: TrainingConfig,
    processor: TokenPackerProcessor,
    output: Path,
    *,
    position: dict[str, Any] | None = None,
    progress: bool = False,
) -> Source:
    """The source that a config names.

    Args:
        output: the run's folder; an index of the data and the rejects are kept there.
        position: that a checkpoint kept of a stream.

    Raises:
        ValueError: for data that are missing or do not fit.
        ImportError: for formats whose library is missing.
        TooManyRejects: when too much of the data is bad.
    """
    check_source(config)
    if config.data.scenes is not None:
        return _scenes(config, config.data.scenes, processor)
    if is_stream(config):
        return _stream(config, processor, output, position)
    data = look_through(config, processor, output, progress)
    digest = hashlib.sha256(data.lengths.tokens.tobytes() + data.lengths.tiles.tobytes())
    digest.update(json.dumps(data.plan.batches).encode())
    maker = BatchMaker(data.maker, config, _decoding_rejects(config, len(data.lengths.usable), output))
    return Source(
        batches=RunBatches(data.plan, data.records, maker),
        num_steps=data.plan.num_steps,
        samples_per_step=data.plan.samples_per_step,
        fingerprint=digest.hexdigest(),
        facts={
            "data": str(config.data.path),
            "samples used": f"{len(data.lengths.usable):,} of {len(data.records):,}",
            "places that held a token": f"{data.plan.fill:.1%}",
        },
    )


def check_source(config: TrainingConfig) -> None:
    """Raises what `open_source` would, as far as settings and names of files tell; nothing is opened or fetched."""
    data = config.data
    if data.scenes is not None:
        for name in ("path", "images", "format"):
            if getattr(data, name) is not None:
                raise ValueError(
                    f"data.{name} and data.scenes exclude each other; set data.scenes=null for data of your own"
                )
        if config.batch_size != 1 or not config.scale_factors:
            raise ValueError("data.scenes needs batch_size=1 (a batch is a step) and scale_factors")
        _steps_given(config, "generated scenes have no end")
    elif data.path is None:
        raise ValueError("data.path is missing; give the data file, shards or a hub id with --data")
    elif is_stream(config):
        _steps_given(config, "a stream does not tell its length")
        if data.format != "hub":
            _open_stream(config)
    else:
        check_files(data.path, data.images, format=data.format)  # type: ignore[arg-type]


def same_beginning(source: Source, other: Source, num_steps: int) -> bool:
    """Whether two sources that differ in length alone have the same batches in their first steps."""
    mine, theirs = source.batches, other.batches
    if isinstance(mine, RunBatches) and isinstance(theirs, RunBatches):
        num_batches = num_steps * mine.plan.batches_per_step
        return mine.plan.batches[:num_batches] == theirs.plan.batches[:num_batches]
    if isinstance(mine, Steps) and isinstance(theirs, Steps):
        ends = [steps.spec.one_tile_share * steps.num_steps for steps in (mine, theirs)]
        return ends[0] == ends[1] or min(ends) >= num_steps
    return True


def look_through(
    config: TrainingConfig, processor: TokenPackerProcessor, output: Path | None, progress: bool = False
) -> RunData:
    """The records of a run: every sample's length is known, none is decoded. Raises ValueError as `open_source`."""
    assert config.data.path is not None
    records = open_records(config.data.path, config.data.images, format=config.data.format)  # type: ignore[arg-type]
    maker = _sample_maker(config, processor)
    rejects = Rejects(output / REJECTS if output else None, config.data.max_reject_share)
    lengths = index_lengths(
        records,
        maker,
        scale_factor=min(config.scale_factors, default=None),  # the longest that a sample can get
        rejects=rejects,
        cache=output / INDEX if output else None,
        progress=progress,
    )
    rejects.finish()
    lengths = planned_lengths(lengths, config.data.max_tiles_per_batch)
    return RunData(records, maker, lengths, RunPlan.make(config, lengths), rejects)


def is_stream(config: TrainingConfig) -> bool:
    """Whether the data can only be read in order."""
    if config.data.format is not None:
        return config.data.format in ("webdataset", "hub")
    path = Path(config.data.path or "")
    names = [entry.name for entry in path.iterdir()] if path.is_dir() else [path.name]
    return any(name.endswith(TAR_ENDINGS) for name in names)


def _stream(
    config: TrainingConfig, processor: TokenPackerProcessor, output: Path, position: dict[str, Any] | None
) -> Source:
    steps = _steps_given(config, "a stream does not tell its length")
    stream = _open_stream(config)
    rejects = _decoding_rejects(config, None, output)
    maker = BatchMaker(_sample_maker(config, processor), config, rejects)
    per_step = config.batch_size // config.device_batch_size
    return Source(
        batches=StreamBatches(stream, maker, config, steps * per_step, position),
        num_steps=steps,
        fingerprint=stream.start()["stream"],
        facts={"data": str(config.data.path), "shards": f"{len(stream.shards):,}, read in order"},
    )


def _open_stream(config: TrainingConfig) -> Stream:
    assert config.data.path is not None
    if config.data.format == "hub":
        return open_hub_dataset(config.data.path, config.data.images, seed=config.seed)
    if config.data.images is not None:
        raise ValueError("data.images has no use with tar shards, which hold their images; leave --images out")
    return open_shards(config.data.path, seed=config.seed)


def _scenes(config: TrainingConfig, scenes: ScenesConfig, processor: TokenPackerProcessor) -> Source:
    images = processor.image_processor
    spec = StepSpec(
        show="pixels",
        captions=scenes.captions,
        one_tile_share=scenes.one_tile_share,
        paced_at=scenes.paced_at,
        scale_factors=config.scale_factors,
        max_tiles=images.max_tiles,
        tile_size=images.tile_size,
        patch_size=images.tile_size[0] // processor.patch_grid[0],
        regions=scenes.regions,
    )
    steps = _steps_given(config, "generated scenes have no end")
    decisive = dataclasses.asdict(spec)
    if spec.regions is None:
        del decisive["regions"]  # runs from before there were any go on
    made_of = json.dumps([decisive, config.seed])
    return Source(
        batches=Steps(spec, processor.tokenizer, num_steps=steps, seed=config.seed, processor=processor),
        num_steps=steps,
        fingerprint=hashlib.sha256(made_of.encode()).hexdigest(),
        facts={"data": f"easy-VQA{', regions' if spec.regions else ''} and fine print, drawn while training"},
    )


def _steps_given(config: TrainingConfig, why: str) -> int:
    if config.max_steps is None:
        raise ValueError(f"max_steps is missing, and {why}; give it with --set max_steps=1000")
    return config.max_steps


def _sample_maker(config: TrainingConfig, processor: TokenPackerProcessor) -> SampleMaker:
    return SampleMaker(processor, config.model.chat_format, config.data.max_length)


def _decoding_rejects(config: TrainingConfig, num_samples: int | None, output: Path) -> Rejects:
    """The counts of what decoding finds, judged by the whole data set where its size is known."""
    return Rejects(output / REJECTS, config.data.max_reject_share, num_samples=num_samples)
