"""Vision tower, projector, region encoder and language model as one: images, regions and text to hidden states.

Shapes: B samples, S sequence length, N tiles and R regions of all samples in order, P tiles of an image at most, L
patches of a tile, D language width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, Cache, LlavaModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from tokenpacker import projectors
from tokenpacker.features import VisionFeatures
from tokenpacker.hf.configuration import TokenPackerConfig
from tokenpacker.hf.image_inputs import ImageInputs
from tokenpacker.hf.outputs import ImageFeatures, TokenPackerModelOutput, image_fields
from tokenpacker.hf.pretrained import TokenPackerPreTrainedModel
from tokenpacker.hf.versions import CACHE, cache_argument
from tokenpacker.hf.vision_encoder import TOWER_STATES, build_spare_layers, build_vision_tower, encode_tiles
from tokenpacker.projectors.base import pack_tiles
from tokenpacker.regions import RegionEncoder, scatter_region_tokens
from tokenpacker.sequence import scatter_image_tokens

OLD_ARGUMENTS = {"packed_tokens", "region_tokens"}  # of version 0.1.0; language models ignore unknown arguments
TEXT_TOKEN = -1  # the id of every token but placeholders, if only embeddings were given


class TokenPackerModel(TokenPackerPreTrainedModel, LlavaModel):
    """LLaVA's model with any registered projector, tiles, scale factors per tile, and regions; without the head.

    `vision_chunk_tiles` bounds the number of tiles that pass a frozen tower at once; None takes all. Set None if every
    process must call the tower equally often, as under DeepSpeed ZeRO-3, and for `torch.export`.
    """

    vision_chunk_tiles: int | None = 32  # more than a released model's largest image has: 25 tiles and a thumbnail

    def __init__(self, config: TokenPackerConfig):
        TokenPackerPreTrainedModel.__init__(self, config)
        self.vision_tower = build_vision_tower(config)
        if config.keep_spare_vision_layers:
            self.spare_vision_layers = build_spare_layers(config)
        self.multi_modal_projector = projectors.build(config.projector)
        self.region_encoder = None if config.regions is None else RegionEncoder(config.regions)
        # each on one device
        self._no_split_modules = [type(self.multi_modal_projector).__name__, RegionEncoder.__name__]
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def vision_features(self, pixel_values: Tensor) -> VisionFeatures:
        """Vision features of tiles (N, 3, h, w), as the projector gets them.

        Raises:
            ValueError: for tiles of another size than the vision tower's.
        """
        return self._encode(pixel_values)[0]

    def _encode(self, pixel_values: Tensor, **kwargs: bool) -> tuple[VisionFeatures, BaseModelOutput]:
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
            **kwargs,
        )

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        scale_factor: int | None = None,
        scale_factors: Tensor | None = None,
        tile_index: Tensor | None = None,
        region_cells: Tensor | None = None,
        region_first_tile: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageFeatures:
        """Packed tokens of tiles as `pooler_output`, and region tokens. For the arguments see `ImageInputs`.

        Without tiles, (0, 3, h, w), one blank tile is encoded and no token returned. The projector then gets a gradient
        of zero, so that every process of a distributed run takes part. The same holds without regions, (0, P, L).

        Args:
            kwargs: further arguments of the vision tower, such as `output_hidden_states`.

        Raises:
            ValueError: for tiles of another size than the vision tower's, for scale factors or regions that do not fit
                the tiles, and for regions that the model does not know.
        """
        images = ImageInputs(pixel_values, scale_factor, scale_factors, tile_index, region_cells, region_first_tile)
        return self._image_features(images, **kwargs)

    def _image_features(self, images: ImageInputs, **kwargs: Any) -> ImageFeatures:
        assert images.pixel_values is not None
        pixel_values, num_tiles = images.pixel_values, images.pixel_values.shape[0]
        region_encoder = None if images.region_cells is None else self.require_region_encoder()
        projector = self.multi_modal_projector
        factors = images.resolve_scale_factors(getattr(getattr(projector, "config", None), "scale_factor", None))
        if num_tiles == 0:
            pixel_values, factors = pixel_values.new_zeros(1, *pixel_values.shape[1:]), None
        asked = {name: True for name in TOWER_STATES if kwargs.get(name, getattr(self.vision_tower.config, name, None))}
        states = BaseModelOutput()
        if asked:
            features, states = self._encode(pixel_values, **asked)
        else:
            features = self.vision_features(pixel_values)
        packed = pack_tiles(projector, _beside(projector, features), factors, images.tile_index)
        regions = None
        if region_encoder is not None:
            beside, cells = _beside(region_encoder, features), images.region_cells
            regions = region_encoder(beside, cells, images.region_first_tile, images.tile_index)
        return ImageFeatures(
            last_hidden_state=features.query[:num_tiles],
            pooler_output=packed if num_tiles else packed[:0],
            hidden_states=states.hidden_states,
            attentions=states.attentions,
            region_tokens=regions,
        )

    def require_region_encoder(self) -> RegionEncoder:
        """The region encoder. Raises ValueError for a model that has none."""
        if self.region_encoder is None:
            raise ValueError(
                "regions were given but the model does not know regions; use one that does, or give it an untrained"
                " region encoder with tokenpacker.hf.add_regions"
            )
        return self.region_encoder

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        scale_factor: int | None = None,
        scale_factors: Tensor | None = None,
        tile_index: Tensor | None = None,
        region_cells: Tensor | None = None,
        region_first_tile: Tensor | None = None,
        mm_encoder_outputs: dict[str, ImageFeatures] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenPackerModelOutput:
        """One pass of the language model over text and images.

        A row may hold several samples that do not see each other; see `separate_samples`.

        Args:
            input_ids: (B, S) with the placeholders wherever a packed token or a region token belongs.
            pixel_values: (N, 3, h, w) tiles. For these and the five other arguments about them see `ImageInputs`.
            past_key_values: the cache under its name before transformers 5.24.
            inputs_embeds: (B, S, D) instead of `input_ids`; placeholders are found by their embeddings.
            mm_encoder_outputs: `{"image": ...}` with the output of an earlier `get_image_features` instead of
                `pixel_values`; without `pooler_output` if the images are in the cache already.

        Raises:
            ValueError: if inputs exclude each other, or placeholders and their tokens differ in number.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        for name in OLD_ARGUMENTS & kwargs.keys():
            raise ValueError(f"{name} is given as mm_encoder_outputs={{'image': ImageFeatures(...)}} now")
        given = ImageInputs(pixel_values, scale_factor, scale_factors, tile_index, region_cells, region_first_tile)
        images = given.encoded(mm_encoder_outputs)
        if pixel_values is not None:
            images = self._image_features(given, **kwargs)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if images is not None:
            inputs_embeds = self._scatter(inputs_embeds, input_ids, images)
        context = {"attention_mask": attention_mask, "position_ids": position_ids}
        context |= cache_argument(cache, past_key_values) | kwargs
        outputs = self.language_model(inputs_embeds=inputs_embeds, return_dict=True, **separate_samples(context))
        return TokenPackerModelOutput(**outputs, **image_fields(images))

    def _scatter(self, embeddings: Tensor, input_ids: Tensor | None, images: ImageFeatures) -> Tensor:
        """(B, S, D) embeddings with packed tokens and region tokens in their places.

        Raises:
            ValueError: if placeholders and tokens differ in number, and for regions that the model does not know.
        """
        device, config = embeddings.device, self.config
        ids = self.find_placeholders(embeddings) if input_ids is None else input_ids
        packed, regions = images.pooler_output, images.region_tokens
        if packed is not None:
            packed = packed if isinstance(packed, Tensor) else torch.cat(list(packed))
            embeddings = scatter_image_tokens(embeddings, ids, packed.to(device), config.image_token_id)
        if regions is not None:
            self.require_region_encoder()
        if self.region_encoder is None:
            return embeddings
        if regions is None:  # then there must be no placeholder
            regions = embeddings.new_zeros(0, embeddings.shape[2])
        assert config.region_token_id is not None
        return scatter_region_tokens(embeddings, ids, regions.to(device), config.region_token_id)

    def find_placeholders(self, embeddings: Tensor) -> Tensor:
        """(B, S) ids of the placeholders in embeddings (B, S, D), `TEXT_TOKEN` everywhere else."""
        ids = torch.full(embeddings.shape[:2], TEXT_TOKEN, device=embeddings.device)
        for token_id in (self.config.image_token_id, self.config.region_token_id):
            if token_id is not None:
                sought = self.get_input_embeddings()(torch.tensor(token_id, device=embeddings.device))  # (D,)
                ids = ids.masked_fill((embeddings == sought).all(dim=-1), token_id)
        return ids


def separate_samples(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a language model, changed for packed rows so that samples in a row do not attend to each other.

    Rows are packed if `cu_seq_lens_q` is given. Flash attention reads the samples' bounds from it. Other kinds of
    attention make their masks from `position_ids` that restart in each sample, but only without `attention_mask` and
    without a cache; with either, samples would silently see each other. So both are switched off. Padding is then a
    segment of its own: nothing outside of it sees it.

    Raises:
        ValueError: for packed rows without `position_ids`, and with a cache.
    """
    if inputs.get("cu_seq_lens_q") is None:
        return inputs
    if inputs.get("position_ids") is None:
        raise ValueError("position_ids=None for packed rows; pass what `data.collate.collate_packed` makes")
    if inputs.get(CACHE) is not None or inputs.get("use_cache"):
        raise ValueError(f"{CACHE} or use_cache=True for packed rows; leave them out, these cannot be continued")
    return inputs | {"attention_mask": None, "use_cache": False}


def _beside(module: nn.Module, features: VisionFeatures) -> VisionFeatures:
    """The features on the module's device; device maps may place encoder and projector apart.

    Offloaded weights are on the meta device; accelerate's hooks then bring weights and inputs together.
    """
    device = next(module.parameters()).device
    return features if device.type == "meta" else features.to(device)
