"""Training on a GPU: the memory of a LoRA step beside what `train --dry-run` says, and FSDP2."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import TrainerCallback

import tokenpacker.train
from benchmarks.gpu import ROOT
from benchmarks.gpu.run import Run
from benchmarks.training.data import ANNOTATIONS, write_samples
from tokenpacker.carried.recipes import find_recipe
from tokenpacker.sequence import IGNORED
from tokenpacker.speed.memory import PeakMemory, random_model
from tokenpacker.speed.model_sizes import Shapes
from tokenpacker.speed.stopwatch import Stopwatch
from tokenpacker.train.assemble import model_config, parts_of, unfreeze
from tokenpacker.train.config import TrainingConfig
from tokenpacker.train.preview import preview
from tokenpacker.train.trainer import PartTrainer, training_arguments

GIB = 2**30
RECIPE = "instruct-7b-lora"
STEPS = 2  # the first makes the optimizer's state, the second has all of it at hand
SHARDED_LAYERS = 4  # of a 7B model's 32: all of them would not fit one device in float32 with their optimizer
FSDP2_CONFIG = Path(tokenpacker.train.__file__).parent / "accelerate" / "fsdp2.yaml"


def training(run: Run) -> None:
    """Steps of the recipe by the package's own trainer, on rows as long as the recipe allows."""
    shapes = run.shapes()
    recipe = find_recipe(RECIPE)
    data = replace(recipe.data, num_workers=0, max_length=128 if run.small else recipe.data.max_length)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("vision", "text"):  # a dry run reads sizes from a model's files
            getattr(shapes.config, f"{part}_config").save_pretrained(folder / part)
        models = {"vision_tower": str(folder / "vision"), "language_model": str(folder / "text")}
        parts = replace(recipe.model, **models, vision_levels=tuple(shapes.config.vision_levels))
        rows = 2 if run.small else recipe.device_batch_size
        while rows >= 1:  # a batch that does not fit is a finding; a smaller one still tells
            sizes = {"batch_size": rows, "device_batch_size": rows, "report_to": ()}
            config = replace(recipe, model=parts, data=data, **sizes)
            if run.attempt(f"{rows} rows of {data.max_length} tokens", partial(_steps, run, config, folder)):
                return
            rows //= 2


def _steps(run: Run, config: TrainingConfig, folder: Path) -> dict[str, Any]:
    """The most memory that the steps took, and what was estimated."""
    shape = model_config(config.model)
    shape.image_token_id = 0
    frozen = random_model(shape, torch.bfloat16, run.device).train()
    frozen.config.use_cache = frozen.config.text_config.use_cache = False
    trained = unfreeze(frozen, config)
    arguments = training_arguments(config, folder / "run", num_workers=0)
    arguments.save_strategy = "no"
    clock = _Clock(run.device)
    trainer = PartTrainer(
        config,
        trained,
        [_batch(config, shape) for _ in range(STEPS)],
        arguments,
        forward_options={"use_cache": False, "only_learned": True},
        callbacks=[clock],
    )
    peak = PeakMemory(run.device)
    peak.start()
    trainer.train()
    measured = peak.stop() or 0
    return {
        "recipe": config.name,
        "rows": config.device_batch_size,
        "row_tokens": config.data.max_length,
        "measured_gib": measured / GIB,
        "estimated_gib": preview(config).memory_gib,
        "step_s": clock.watch.wall["step"],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def _batch(config: TrainingConfig, shape: Any) -> dict[str, Tensor]:
    """Rows that are full: an image first, and all else is learned, as the estimate takes it without data."""
    rows, length = config.device_batch_size, config.data.max_length
    input_ids = torch.randint(3, shape.text_config.vocab_size, (rows, length))
    input_ids[:, 1 : 1 + shape.projector.num_tokens(shape.patch_grid)] = shape.image_token_id
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": input_ids.masked_fill(input_ids == shape.image_token_id, IGNORED),
        "pixel_values": torch.randn(rows, 3, *shape.tile_size),
    }


class _Clock(TrainerCallback):
    """Times each step."""

    def __init__(self, device: torch.device) -> None:
        self.watch = Stopwatch(device)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.watch.start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.watch.stop("step")


def fsdp2(run: Run) -> None:
    """Steps of a model in shards beside those of the same model whole; then a run of the package's command."""
    shapes = run.shapes(SHARDED_LAYERS)
    whole: list[float] = []
    backend = "nccl" if run.device.type == "cuda" else "gloo"
    run.attempt("a model whole", lambda: _sharded_steps(run, shapes, whole, sharded=False))
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    run.attempt("the same model by fully_shard", lambda: _sharded_steps(run, shapes, whole, sharded=True))
    torch.distributed.destroy_process_group()
    if run.device.type == "cuda":
        run.attempt("tokenpacker train under accelerate's FSDP2", lambda: _command(run))
    else:
        run.note("tokenpacker train under accelerate's FSDP2: not run, accelerate has it on GPUs alone")


def _sharded_steps(run: Run, shapes: Shapes, whole: list[float], sharded: bool) -> dict[str, Any]:
    """Two steps of AdamW in float32, and their memory; in shards their losses must be those of the whole model."""
    torch.manual_seed(0)
    model = random_model(shapes.config, torch.float32, run.device).train()
    for part in parts_of(model)["vision_tower"]:
        part.requires_grad_(False)
    if sharded:
        mesh = torch.distributed.init_device_mesh(run.device.type, (1,))
        for module in (*parts_of(model)["projector"], *model.model.language_model.layers, model):
            fully_shard(module, mesh=mesh)
    config = replace(find_recipe(RECIPE), device_batch_size=2)
    config = replace(config, data=replace(config.data, max_length=64 if run.small else 512))
    batch = {name: tensor.to(run.device) for name, tensor in _batch(config, shapes.config).items()}
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)
    peak = PeakMemory(run.device)
    peak.start()
    losses, begin = [], time.time()
    for _ in range(2):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if sharded and not all(abs(one - other) < 1e-3 for one, other in zip(losses, whole, strict=True)):
        raise ValueError(f"losses {losses} in shards are not those of the whole model, {whole}")
    whole[:] = losses
    return {
        "what": "by fully_shard" if sharded else "whole",
        "losses": losses,
        "seconds": time.time() - begin,
        "peak_gib": (peak.stop() or 0) / GIB,
    }


def _command(run: Run) -> dict[str, Any]:
    """What a user types: the carried model, three steps on a few conversations."""
    with tempfile.TemporaryDirectory() as name:
        folder, begin = Path(name), time.time()
        write_samples(folder, 16, 96, seed=0)
        settings = ("max_steps=3", "batch_size=4", "device_batch_size=2", "report_to=[]", "data.num_workers=0")
        command = ["--config_file", str(FSDP2_CONFIG), "--num_processes", "1", "-m", "tokenpacker", "train"]
        command += ["instruct-7b", "--start", "tiny", "--data", str(folder / ANNOTATIONS), "--images", str(folder)]
        command += ["--output", str(folder / "run"), *(word for setting in settings for word in ("--set", setting))]
        launch = [sys.executable, "-m", "accelerate.commands.launch", *command]
        ended = subprocess.run(launch, cwd=ROOT, capture_output=True, text=True)
        if ended.returncode:
            sys.stderr.write(ended.stderr)
            raise RuntimeError(f"status {ended.returncode}: {ended.stderr.strip()[-160:]}")
        steps = json.loads((folder / "run" / "history.json").read_text(encoding="utf-8"))["steps"]
        return {
            "what": "tokenpacker train",
            "losses": [step["loss"] for step in steps],
            "seconds": time.time() - begin,
            "peak_gib": None,
        }
