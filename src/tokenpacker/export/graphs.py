"""The parts of a model that become graphs: vision encoder with projector, embeddings, decoder with cache.

Names of graphs, inputs and outputs are those of transformers.js for image-text models.

Shapes: N tiles, T packed tokens of a tile, B samples, S new positions, P positions in the cache, D language width, V
vocabulary, K key-value heads, E width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import DynamicCache

from tokenpacker.hf import TokenPackerForConditionalGeneration
from tokenpacker.hf.versions import CACHE
from tokenpacker.hf.vision_encoder import encode_tiles
from tokenpacker.projectors.token_packer import TokenPacker

VISION, EMBED, DECODER = "vision_encoder", "embed_tokens", "decoder_model_merged"
TRACED = {"tiles": 3, "batch": 2, "new": 3, "past": 5}  # all different, and none is 0 or 1, which torch.export fixes

TILES, BATCH, NEW, PAST, ALL = (
    "num_tiles",
    "batch_size",
    "sequence_length",
    "past_sequence_length",
    "total_sequence_length",
)
"""Names of dynamic dimensions. transformers.js makes the first, empty cache from `batch_size`; others it takes as 0."""


class VisionEncoder(nn.Module):
    """Tiles (N, 3, h, w) to packed tokens (N, T, D) at one scale factor."""

    def __init__(self, model: TokenPackerForConditionalGeneration, projector: nn.Module, scale_factor: int | None):
        super().__init__()
        self.vision_tower, self.projector = model.model.vision_tower, projector
        config = model.config
        self.features = (config.patch_grid, config.vision_levels, config.vision_query_level)
        self.scale_factor = scale_factor

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Returns `image_features`."""
        features, _ = encode_tiles(self.vision_tower, pixel_values, *self.features)
        return {"image_features": self.projector(features, self.scale_factor)}


class Embeddings(nn.Module):
    """Token ids (B, S) to embeddings (B, S, D)."""

    def __init__(self, model: TokenPackerForConditionalGeneration):
        super().__init__()
        self.embeddings = model.get_input_embeddings()

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Returns `inputs_embeds`."""
        return {"inputs_embeds": self.embeddings(input_ids)}


class Decoder(nn.Module):
    """Embeddings of new positions and the cache of earlier ones to the logits after the last, and the longer cache."""

    def __init__(self, model: TokenPackerForConditionalGeneration):
        super().__init__()
        self.language_model, self.lm_head = model.model.language_model, model.lm_head

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: dict[str, dict[str, Tensor]],
    ) -> dict[str, Any]:
        """Returns `logits` (B, 1, V), and in `present` keys and values (B, K, P + S, E) of each layer."""
        cache = DynamicCache([(layer["key"], layer["value"]) for layer in past_key_values.values()])
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            return_dict=True,
            **{CACHE: cache},
        )
        layers = outputs[CACHE].layers
        present = {str(number): {"key": layer.keys, "value": layer.values} for number, layer in enumerate(layers)}
        return {"logits": self.lm_head(outputs.last_hidden_state[:, -1:]), "present": present}


@dataclass(frozen=True)
class Graph:
    """A module with inputs to trace it.

    Args:
        name: of the graph, and the beginning of its file's name.
        axes: for each input and output, by its name in the graph, the names of its dynamic dimensions.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Any]
    axes: dict[str, dict[int, str]]

    def dynamic_shapes(self) -> dict[str, Any]:
        """The dynamic dimensions of the inputs, as `torch.export` takes them."""

        def dynamic(value: Any, name: str) -> Any:
            if isinstance(value, dict):
                return {key: dynamic(entry, f"{name}.{key}") for key, entry in value.items()}
            return dict.fromkeys(self.axes[name], Dim.DYNAMIC)

        return {name: dynamic(value, name) for name, value in self.inputs.items()}


def vision_graphs(model: TokenPackerForConditionalGeneration, scale_factors: Sequence[int | None]) -> Iterator[Graph]:
    """The vision encoder at each scale factor, the first under the plain name. Its projector is folded if it can be.

    Raises:
        ValueError: for a projector with replaced, hooked or quantized parts.
    """
    projector: nn.Module = model.model.multi_modal_projector
    if type(projector) is TokenPacker and not projector.config.beyond_the_paper:
        projector = projector.fold()
    axes = {"pixel_values": {0: TILES}, "image_features": {0: TILES}}
    tiles = torch.zeros(TRACED["tiles"], 3, *model.config.tile_size)
    for place, factor in enumerate(scale_factors):
        name = VISION if place == 0 else f"{VISION}_s{factor}"
        yield Graph(name, VisionEncoder(model, projector, factor), {"pixel_values": tiles}, axes)


def text_graphs(model: TokenPackerForConditionalGeneration) -> Iterator[Graph]:
    """The embeddings and the decoder."""
    size = (TRACED["batch"], TRACED["new"])
    sequence = {0: BATCH, 1: NEW}
    ids = {"input_ids": torch.zeros(size, dtype=torch.int64)}
    yield Graph(EMBED, Embeddings(model), ids, {"input_ids": sequence, "inputs_embeds": sequence})
    config = model.config.text_config
    layers, past, width = map(str, range(config.num_hidden_layers)), TRACED["past"], head_dim(config)
    inputs: dict[str, Any] = {
        "inputs_embeds": torch.zeros(*size, config.hidden_size),
        "attention_mask": torch.ones(size[0], past + size[1], dtype=torch.int64),
        "position_ids": torch.arange(past, past + size[1]).repeat(size[0], 1),
        "past_key_values": {
            layer: {part: torch.zeros(size[0], key_value_heads(config), past, width) for part in ("key", "value")}
            for layer in layers
        },
    }
    axes = {"inputs_embeds": sequence, "attention_mask": {0: BATCH, 1: ALL}, "position_ids": sequence}
    axes["logits"] = {0: BATCH}
    for layer, parts in inputs["past_key_values"].items():
        for part in parts:
            axes[f"past_key_values.{layer}.{part}"] = {0: BATCH, 2: PAST}
            axes[f"present.{layer}.{part}"] = {0: BATCH, 2: ALL}
    yield Graph(DECODER, Decoder(model), inputs, axes)


def key_value_heads(text_config: Any) -> int:
    """The number of heads whose keys and values are kept."""
    own: int | None = getattr(text_config, "num_key_value_heads", None)
    return own or text_config.num_attention_heads


def head_dim(text_config: Any) -> int:
    """Width of an attention head; configs that do not say it divide the model's width evenly."""
    own: int | None = getattr(text_config, "head_dim", None)
    return own or text_config.hidden_size // text_config.num_attention_heads


@contextmanager
def plain_attention(model: TokenPackerForConditionalGeneration) -> Iterator[None]:
    """Within the context, attention is made of matrix products and a softmax, which every runtime has."""
    parts = (model.model.vision_tower, model.model.language_model)
    before = [part.config._attn_implementation for part in parts]
    try:
        for part in parts:
            part.set_attn_implementation("eager")
        yield
    finally:
        for part, name in zip(parts, before, strict=True):
            part.set_attn_implementation(name)
