"""What a run would do, without loading weights: parameters by part, tokens of the samples, steps, memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tokenpacker.hf.config import TokenPackerConfig
from tokenpacker.hf.model import TokenPackerForConditionalGeneration
from tokenpacker.train.assemble import load_processor, model_config, parts_of
from tokenpacker.train.config import PARTS, TrainingConfig
from tokenpacker.train.sources import is_stream, look_through

FLOAT32, SIXTEEN_BITS, FOUR_BITS = 4.0, 2.0, 0.5625  # bytes a weight; NF4 with one float32 per 64 weights
# Of a trained weight: itself, its gradient and AdamW's two moments, all in float32.
TRAINED_BYTES = 4 * FLOAT32
# Activations that a LLaMA layer keeps per token, in multiples of its width, without recomputing. Counted from its
# modules: norms, queries, keys, values, attention output, gate, up and product (2.7 times as wide each).
KEPT_PER_LAYER = 16


@dataclass(frozen=True)
class Preview:
    """What `--dry-run` tells.

    Args:
        parameters: part -> {trainable, frozen}.
        samples: how many are used, have images, are left out; tokens at the median, 95th percentile and most.
        memory_gib: per device, before sharding: weights, trained state, activations and logits of one batch.
    """

    config: dict[str, Any]
    parameters: dict[str, dict[str, int]]
    samples: dict[str, Any] | None
    steps: int | None
    memory_gib: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "config": self.config,
            "parameters": self.parameters,
            "samples": self.samples,
            "steps": self.steps,
            "memory_gib": self.memory_gib,
        }


def preview(config: TrainingConfig) -> Preview:
    """The preview of a run; data are looked through where the config names them. Raises ValueError as `run.train`."""
    shape = model_config(config.model)
    with torch.device("meta"):
        model = TokenPackerForConditionalGeneration(shape)
    parameters = {}
    for part, modules in parts_of(model).items():
        count = sum(parameter.numel() for module in modules for parameter in module.parameters())
        learns = part in config.train
        parameters[part] = {"trainable": count if learns else 0, "frozen": 0 if learns else count}
    if config.lora is not None:
        parameters["lora"] = {"trainable": _lora_parameters(shape, config.lora.rank), "frozen": 0}
    samples, steps = None, config.max_steps
    if config.data.path is not None and not is_stream(config):
        data = look_through(config, load_processor(config.model), None)
        tokens = data.lengths.tokens[data.lengths.usable]
        samples = {
            "used": len(tokens),
            "with_images": int((data.lengths.tiles[data.lengths.usable] > 0).sum()),
            "left_out": data.rejects.num_rejected,
            "tokens": int(tokens.sum()),
            "median": int(_quantile(tokens, 0.5)),
            "p95": int(_quantile(tokens, 0.95)),
            "longest": int(tokens.max()),
            "fill": round(data.plan.fill, 4),
        }
        steps = data.plan.num_steps
    return Preview(config.to_dict(), parameters, samples, steps, _memory(config, shape, parameters))


def describe(shown: Preview) -> str:
    """The preview as text, but for the config."""
    lines = ["part             trainable         frozen"]
    lines += [f"{part:<14}{n['trainable']:>12,}{n['frozen']:>15,}" for part, n in shown.parameters.items()]
    if shown.samples is not None:
        s = shown.samples
        lines.append(
            f"{s['used']:,} samples ({s['with_images']:,} with images, {s['left_out']:,} left out), {s['tokens']:,}"
            f" tokens: {s['median']} at the median, {s['p95']} at 95 %, {s['longest']} at most; {s['fill']:.0%} of the"
            " places in a batch are filled"
        )
        lines.append(f"{shown.steps:,} steps")
    parts = ", ".join(f"{name} {gib:.1f}" for name, gib in shown.memory_gib.items() if name != "total")
    lines.append(
        f"about {shown.memory_gib['total']:.1f} GiB a device before sharding ({parts}); an estimate, not measured"
    )
    return "\n".join(lines)


def _lora_parameters(config: TokenPackerConfig, rank: int) -> int:
    """Of updates to the seven linear layers of each LLaMA layer."""
    text = config.text_config
    key_value = (
        text.hidden_size * getattr(text, "num_key_value_heads", text.num_attention_heads) // text.num_attention_heads
    )
    widths = 2 * (2 * text.hidden_size) + 2 * (text.hidden_size + key_value)
    widths += 3 * (text.hidden_size + text.intermediate_size)
    return rank * widths * text.num_hidden_layers


def _memory(
    config: TrainingConfig, model: TokenPackerConfig, parameters: dict[str, dict[str, int]]
) -> dict[str, float]:
    frozen_bytes = SIXTEEN_BITS if config.precision == "bfloat16" else FLOAT32
    language_bytes = FOUR_BITS if config.lora is not None and config.lora.four_bit else frozen_bytes
    frozen = sum(
        parameters[part]["frozen"] * (language_bytes if part == "language_model" else frozen_bytes) for part in PARTS
    )
    trained = sum(part["trainable"] for part in parameters.values()) * TRAINED_BYTES
    text = model.text_config
    tokens = config.device_batch_size * config.data.max_length
    kept = 1 if config.checkpointing else KEPT_PER_LAYER
    activations = tokens * text.hidden_size * (text.num_hidden_layers * kept + KEPT_PER_LAYER) * frozen_bytes
    logits = tokens * text.vocab_size * 2 * FLOAT32  # in float32, and their gradient
    sizes = {"frozen weights": frozen, "trained weights": trained, "activations": activations, "logits": logits}
    result = {name: size / 2**30 for name, size in sizes.items()}
    return {name: round(gib, 2) for name, gib in (result | {"total": sum(result.values())}).items()}


def _quantile(values: Any, share: float) -> float:
    return float(sorted(values.tolist())[min(len(values) - 1, int(share * len(values)))])
