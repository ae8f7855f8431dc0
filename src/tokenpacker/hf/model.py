"""The complete model: vision tower, projector and language model, with the behaviour of a transformers model.

Shapes: B samples, S sequence length, N tiles of all samples in order, T packed tokens per tile, D language width.
With `tile_index`, U different tiles are given and N are used.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput

from tokenpacker import projectors
from tokenpacker.features import VisionFeatures
from tokenpacker.hf.config import TokenPackerConfig
from tokenpacker.hf.packing import separate_samples
from tokenpacker.hf.vision_encoder import build_spare_layers, build_vision_tower, encode_tiles, encoder_layers
from tokenpacker.sequence import IGNORED, scatter_image_tokens

IMAGE_INPUTS = ("pixel_values", "tile_index", "packed_tokens")  # of the prompt; generation needs them once


@dataclass
class TokenPackerModelOutput(ModelOutput):
    """What the language model gives, and the packed tokens (N, T, D) that went into it."""

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None


@dataclass
class TokenPackerCausalLMOutput(ModelOutput):
    """`loss` when labels are given, `logits` (B, S, vocabulary), and the rest of `TokenPackerModelOutput`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None


class TokenPackerPreTrainedModel(PreTrainedModel):
    """Loading, saving and the capabilities that the parts inherit from transformers."""

    config_class = TokenPackerConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012 - transformers' convention
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: TokenPackerConfig):
        super().__init__(config)
        unused = range(config.num_vision_layers, config.vision_config.num_hidden_layers)
        head_and_norm = r"vision_tower\..*(head|post_layernorm)\."
        self._keys_to_ignore_on_load_unexpected = [
            head_and_norm,
            *(rf"vision_tower\..*layers?\.{layer}\." for layer in unused),
        ]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, projectors.Projector):
            module.init_weights()
        else:
            super()._init_weights(module)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # transformers passes over modules of other packages that have no parameters of their own: over most projectors
        if isinstance(module, projectors.Projector):
            is_custom_code = all(getattr(weight, "_is_hf_initialized", False) for weight in module.parameters())
        super()._initialize_weights(module, is_custom_code)


class TokenPackerModel(TokenPackerPreTrainedModel):
    """Vision tower, projector and language model without its head.

    `vision_chunk_tiles` bounds how many tiles pass a tower at once that does not learn; None takes all. Set None where
    every process must call it equally often, as under DeepSpeed ZeRO-3.
    """

    vision_chunk_tiles: int | None = 32  # more than a released model's largest image has: 25 tiles and a thumbnail

    def __init__(self, config: TokenPackerConfig):
        super().__init__(config)
        self.vision_tower = build_vision_tower(config)
        if config.keep_spare_vision_layers:
            self.spare_vision_layers = build_spare_layers(config)
        self.projector = projectors.build(config.projector)
        self._no_split_modules = [type(self.projector).__name__]  # device maps keep a projector on one device
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Puts another token embedding into the language model."""
        self.language_model.set_input_embeddings(value)

    def vision_features(self, pixel_values: Tensor) -> VisionFeatures:
        """What the projector gets of tiles (N, 3, h, w).

        Raises:
            ValueError: for tiles of another size than the vision tower's.
        """
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[2:]) != self.config.tile_size:
            height, width = self.config.tile_size
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)} but the vision tower reads tiles (N, 3, {height},"
                f" {width}); use the model's own processor"
            )
        return encode_tiles(
            self.vision_tower,
            pixel_values.to(self.vision_tower.dtype),
            self.config.patch_grid,
            self.config.vision_levels,
            self.config.vision_query_level,
            self.vision_chunk_tiles,
        )

    def get_image_features(
        self, pixel_values: Tensor, scale_factor: int | None = None, tile_index: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Packed tokens of tiles (N, 3, h, w) as `pooler_output` (N, T, D); `last_hidden_state` is the query level.

        No tiles at all, (0, 3, h, w), give no tokens, but a blank tile goes through: so the projector gets a gradient,
        of zero, on every process of a distributed run, and none waits for another.

        Args:
            tile_index: (N,), which of the tiles comes when, for tiles (U, 3, h, w) of which each is encoded once.

        Raises:
            ValueError: for tiles of another size than the vision tower's and for a scale factor that cannot be.
        """
        num_tiles = pixel_values.shape[0]
        if num_tiles == 0:
            pixel_values = pixel_values.new_zeros(1, *pixel_values.shape[1:])
        features = self.vision_features(pixel_values).to(next(self.projector.parameters()).device)
        packed = self.projector(features, scale_factor)[:num_tiles]
        if tile_index is not None:
            packed = packed[tile_index.to(packed.device)]  # (U, T, D) -> (N, T, D)
        return BaseModelOutputWithPooling(last_hidden_state=features.query[:num_tiles], pooler_output=packed)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        packed_tokens: Tensor | None = None,
        scale_factor: int | None = None,
        tile_index: Tensor | None = None,
        **kwargs: Any,
    ) -> TokenPackerModelOutput:
        """One pass of the language model over text and images.

        A row may hold several samples that do not see each other; see `packing.separate_samples`.

        Args:
            input_ids: (B, S) with the image placeholder wherever a packed token belongs.
            pixel_values: (N, 3, h, w), the tiles of all images in the order of their placeholders.
            packed_tokens: (N, T, D) from an earlier `get_image_features`, instead of `pixel_values`.
            inputs_embeds: (B, S, D) instead of `input_ids`; images must already stand in it.
            scale_factor: for this call; None takes the projector's own.
            tile_index: (N,), which of the tiles (U, 3, h, w) comes when; see `get_image_features`.

        Raises:
            ValueError: when inputs exclude each other, or placeholders and packed tokens differ in number.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if pixel_values is not None and packed_tokens is not None:
            raise ValueError("pass pixel_values or packed_tokens, not both: the latter replace the former")
        if tile_index is not None and pixel_values is None:
            raise ValueError("tile_index was given without pixel_values; it says in which order these are used")
        if pixel_values is not None:
            packed_tokens = self.get_image_features(pixel_values, scale_factor, tile_index).pooler_output
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if packed_tokens is not None:
            if input_ids is None:
                raise ValueError("images need input_ids to find their places; pass them instead of inputs_embeds")
            inputs_embeds = scatter_image_tokens(
                inputs_embeds, input_ids, packed_tokens.to(inputs_embeds.device), self.config.image_token_id
            )
        context = {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values}
        outputs = self.language_model(inputs_embeds=inputs_embeds, **separate_samples(context | kwargs))
        return TokenPackerModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=packed_tokens,
        )


class TokenPackerForConditionalGeneration(TokenPackerPreTrainedModel, GenerationMixin):
    """The model that answers: `TokenPackerModel` and the language model's head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: TokenPackerConfig):
        super().__init__(config)
        self.model = TokenPackerModel(config)
        text_config = config.text_config
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_parts(
        cls, vision_tower: PreTrainedModel, language_model: PreTrainedModel, **config_kwargs: Any
    ) -> TokenPackerForConditionalGeneration:
        """A model around a vision tower and a causal language model, with a freshly initialised projector.

        The parts are taken over, not copied; the tower's layers above the last used level are removed.

        Args:
            config_kwargs: further arguments of `TokenPackerConfig`.

        Raises:
            ValueError: as `TokenPackerConfig`, and for a head with a bias, which the model has no place for.
        """
        head = language_model.get_output_embeddings()
        if head.bias is not None:
            raise ValueError(
                f"the head of {type(language_model).__name__} has a bias; only plain linear heads are supported"
            )
        parts = (copy.deepcopy(vision_tower.config), copy.deepcopy(language_model.config))  # theirs stay as they are
        config = TokenPackerConfig(*parts, **config_kwargs)
        with torch.device("meta"):
            model = cls(config)
        del encoder_layers(vision_tower)[config.num_vision_layers :]
        model.model.vision_tower = vision_tower
        model.model.language_model = language_model.base_model
        model.model.projector = projectors.build(config.projector).to(head.weight.device, head.weight.dtype)
        model.lm_head = head
        model.generation_config = language_model.generation_config
        return model

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Puts another token embedding into the language model."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head."""
        return self.lm_head

    def get_image_features(
        self, pixel_values: Tensor, scale_factor: int | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """As `TokenPackerModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, scale_factor, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        packed_tokens: Tensor | None = None,
        scale_factor: int | None = None,
        tile_index: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        only_learned: bool = False,
        **kwargs: Any,
    ) -> TokenPackerCausalLMOutput:
        """As `TokenPackerModel.forward`, with logits, and a loss where `labels` (B, S) are given (-100 is ignored).

        Args:
            only_learned: makes logits (K, vocabulary) at the K places from which a label is learned and nowhere else:
                the same loss for a fraction of the memory, as images and questions are most of a sequence.

        Raises:
            ValueError: as `TokenPackerModel.forward`, and for `only_learned` without labels.
        """
        if labels is None and only_learned:
            raise ValueError("only_learned=True needs labels; pass them, or leave it out")
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            packed_tokens=packed_tokens,
            scale_factor=scale_factor,
            tile_index=tile_index,
            **kwargs,
        )
        states = outputs.last_hidden_state
        if labels is not None and only_learned:
            following = nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]  # (B, S)
            learned = following != IGNORED
            states, kwargs = states[learned.to(states.device)], kwargs | {"shift_labels": following[learned]}
        else:
            states = states[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]
        logits = self.lm_head(states)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return TokenPackerCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Images enter with the prompt; later steps find them in the cache."""
        if kwargs.get("use_cache", True) and not kwargs.get("is_first_iteration", False):
            kwargs = {key: value for key, value in kwargs.items() if key not in IMAGE_INPUTS}
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Repeats each sample for beams and multiple answers.

        A sample's images must follow it as a group, and are encoded once, not once per beam.
        """
        pixel_values, tile_index, packed = (model_kwargs.pop(name, None) for name in IMAGE_INPUTS)
        if expand_size > 1 and pixel_values is not None:
            scale_factor = model_kwargs.get("scale_factor")
            packed = self.get_image_features(pixel_values, scale_factor, tile_index=tile_index).pooler_output
            pixel_values = tile_index = None
        if expand_size > 1 and packed is not None:
            counts = (input_ids == self.config.image_token_id).sum(dim=1).tolist()
            samples = packed.flatten(0, 1).split(counts)
            packed = torch.cat([sample for sample in samples for _ in range(expand_size)])[None]  # (1, places, D)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        images = dict(zip(IMAGE_INPUTS, (pixel_values, tile_index, packed), strict=True))
        return input_ids, model_kwargs | {key: value for key, value in images.items() if value is not None}
