"""What a run would do, without loading weights: parameters by part, tokens of the samples, steps, memory."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tokenpacker.data.sources import RunData, held_out_config, is_stream, look_through
from tokenpacker.hf.configuration import TokenPackerConfig
from tokenpacker.hf.model import TokenPackerForConditionalGeneration
from tokenpacker.train.assemble import ModelBuilder, parts_of
from tokenpacker.train.config import PARTS, TrainingConfig
from tokenpacker.train.run import check, tasks_of
from tokenpacker.train.scale_distillation import ScaleDistillation

FLOAT32, SIXTEEN_BITS, FOUR_BITS = 4.0, 2.0, 0.5625  # bytes per weight; NF4 has half a byte, and 4 bytes for each 64
TRAINED_BYTES = 4 * FLOAT32  # per trained weight: itself, its gradient and AdamW's two moments
# Activations that a LLaMA layer keeps per token without recomputation, as multiples of its width, about: two norms,
# queries, keys, values, attention output; and of the MLP, 2.7 times as wide, gate, its activation, up and product.
KEPT_PER_LAYER = 16


@dataclass(frozen=True)
class Preview:
    """What `--dry-run` shows.

    Args:
        parameters: part -> {trainable, frozen}.
        samples: how many are trained on, have images, are left out or held out; their regions; their tokens. None
            without a data file.
        steps: optimizer steps; None if they are not known.
        evaluation: every so many steps, the samples held out (None if none are, or without the data), the questions
            of each task, and the number that decides. None without evaluation.
        memory_gib: per device, before sharding: weights, trained state, and for one batch the language model's
            activations and the logits. Without a data file each row counts as `max_length` long.
    """

    config: dict[str, Any]
    parameters: dict[str, dict[str, int]]
    samples: dict[str, Any] | None
    steps: int | None
    evaluation: dict[str, Any] | None
    memory_gib: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


def preview(config: TrainingConfig) -> Preview:
    """The preview of a run; the data are read if the config names them. Raises ValueError if it cannot be run."""
    builder = check(config, with_data=config.data.path is not None or config.data.scenes is not None)
    ScaleDistillation.of_run(config, builder.config)  # for its errors
    with torch.device("meta"):
        model = TokenPackerForConditionalGeneration(builder.config)
    parameters = {}
    for part, modules in parts_of(model).items():
        count = sum(parameter.numel() for module in modules for parameter in module.parameters())
        trained = part in config.train
        parameters[part] = {"trainable": count if trained else 0, "frozen": 0 if trained else count}
    if config.lora is not None:
        parameters["lora"] = {"trainable": _lora_parameters(builder.config, config.lora.rank), "frozen": 0}
    samples, steps, longest, text_share = None, config.max_steps, config.data.max_length, 1.0
    if config.data.path is not None and not is_stream(config):
        data = look_through(config, builder.processor, None)
        samples, steps = _samples(data), data.plan.num_steps
        longest = longest if config.data.packed else samples["longest"]
        text_share = 1 - float(data.lengths.image_tokens[data.trained].sum() / samples["tokens"])
    memory = _memory(config, builder.config, parameters, config.device_batch_size * longest, text_share)
    evaluation = _evaluation(config, builder, None if samples is None else samples["held_out"] or None)
    return Preview(config.to_dict(), parameters, samples, steps, evaluation, memory)


def describe(shown: Preview) -> str:
    """The preview as text, without the config."""
    lines = [f"{'part':<14}{'trainable':>16}{'frozen':>16}"]
    lines += [f"{part:<14}{n['trainable']:>16,}{n['frozen']:>16,}" for part, n in shown.parameters.items()]
    if shown.samples is not None:
        s = shown.samples
        held_out = f", {s['held_out']:,} more held out" if s["held_out"] else ""
        lines.append(
            f"{s['used']:,} samples ({s['with_images']:,} with images, {s['regions']:,} regions, {s['left_out']:,} left"
            f" out{held_out}), {s['tokens']:,}"
            f" tokens: {s['median']} at the median, {s['p95']} at 95 %, {s['longest']} at most; {s['fill']:.0%} of the"
            " places in a batch are filled"
        )
        lines.append(f"{shown.steps:,} steps, of {s['per_step']:g} samples each on average")
    elif shown.config["data"]["path"] is None and shown.config["data"]["scenes"] is None:
        lines.append("no data given; the run needs --data, and with it samples and steps are shown here")
    elif shown.steps is not None:
        lines.append(f"{shown.steps:,} steps")
    if shown.evaluation is not None:
        e = shown.evaluation
        measured = [] if e["held_out"] is None else [f"the loss of {e['held_out']:,} samples"]
        measured += [f"{count:,} questions of {name}" for name, count in e["questions"].items()]
        lines.append(
            f"evaluated every {e['every']:,} steps and after the last: {', '.join(measured)}; the best by"
            f" {e['decided_by']} is kept"
        )
    parts = ", ".join(f"{name} {gib:.1f}" for name, gib in shown.memory_gib.items() if name != "total")
    lines.append(
        f"about {shown.memory_gib['total']:.1f} GiB a device before sharding ({parts}); an estimate, not measured"
    )
    return "\n".join(lines)


def _samples(data: RunData) -> dict[str, Any]:
    """Counts of a run's samples, and of their tokens."""
    trained, lengths = data.trained, data.lengths
    tokens = lengths.tokens[trained]
    return {
        "used": len(tokens),
        "with_images": int((lengths.tiles[trained] > 0).sum()),
        "regions": int(lengths.regions[trained].sum()),
        "left_out": data.rejects.num_rejected,
        "held_out": len(data.held_out),
        "tokens": int(tokens.sum()),
        "median": int(np.quantile(tokens, 0.5, method="higher")),
        "p95": int(np.quantile(tokens, 0.95, method="higher")),
        "longest": int(tokens.max()),
        "fill": round(data.plan.fill, 4),
        "per_step": round(data.plan.samples_per_step, 1),
    }


def _evaluation(config: TrainingConfig, builder: ModelBuilder, held_out: int | None) -> dict[str, Any] | None:
    """What is measured on the way. Reads the held-out file and the tasks, and raises their errors."""
    if config.eval_every is None:
        return None
    if config.evaluation.held_out is not None:
        held_out = len(look_through(held_out_config(config), builder.processor, None).lengths.usable)
    return {
        "every": config.eval_every,
        "held_out": held_out,
        "questions": {task.name: len(task.questions) for task in tasks_of(config, builder)},
        "decided_by": config.evaluation.decided_by,
    }


def _lora_parameters(config: TokenPackerConfig, rank: int) -> int:
    """Parameters of the low-rank updates to the seven linear layers of each LLaMA layer."""
    text = config.text_config
    key_value = (
        text.hidden_size * getattr(text, "num_key_value_heads", text.num_attention_heads) // text.num_attention_heads
    )
    widths = 2 * (2 * text.hidden_size) + 2 * (text.hidden_size + key_value)
    widths += 3 * (text.hidden_size + text.intermediate_size)
    return rank * widths * text.num_hidden_layers


def _memory(
    config: TrainingConfig,
    model: TokenPackerConfig,
    parameters: dict[str, dict[str, int]],
    num_tokens: int,
    text_share: float,
) -> dict[str, float]:
    """GiB by kind, for device batches of `num_tokens`, of which `text_share` is text, which may be learned."""
    text = model.text_config
    in_bfloat16 = config.precision == "bfloat16"
    frozen_bytes = SIXTEEN_BITS if in_bfloat16 else FLOAT32
    frozen = sum(parameters[part]["frozen"] for part in PARTS) * frozen_bytes
    if config.lora is not None and config.lora.four_bit:
        whole = 2 * text.vocab_size * text.hidden_size  # embedding and head stay as they are
        frozen -= (parameters["language_model"]["frozen"] - whole) * (frozen_bytes - FOUR_BITS)
    trainable = sum(part["trainable"] for part in parameters.values())
    trained = trainable * (TRAINED_BYTES + (SIXTEEN_BITS if in_bfloat16 else 0))  # autocast computes with a copy
    kept = 1 if config.checkpointing else KEPT_PER_LAYER
    # The residual stream is float32 if the weights of the layers are.
    stream_bytes = FLOAT32 if "language_model" in config.train else frozen_bytes
    activations = num_tokens * text.hidden_size * (text.num_hidden_layers * kept + KEPT_PER_LAYER) * stream_bytes
    logits = num_tokens * text_share * text.vocab_size * 2 * FLOAT32  # in float32, and their gradient
    sizes = {"frozen weights": frozen, "trained weights": trained, "activations": activations, "logits": logits}
    result = {name: size / 2**30 for name, size in sizes.items()}
    return {name: round(gib, 2) for name, gib in (result | {"total": sum(result.values())}).items()}
