"""Vision tower, projector, region encoder and language model as one: images, regions and text to hidden states.

Shapes: B samples, S sequence length, N tiles of all samples in order, T packed tokens per tile, R regions of all
samples in order, P tiles of an image at most, L patches of a tile, D language width. With `tile_index`, U different
tiles are given and N are used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, Cache, LlavaModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, torch_compilable_check

from tokenpacker import projectors
from tokenpacker.features import VisionFeatures
from tokenpacker.hf.configuration import TokenPackerConfig
from tokenpacker.hf.outputs import ImageFeatures, TokenPackerModelOutput, image_fields, name_cache
from tokenpacker.hf.packing import separate_samples
from tokenpacker.hf.pretrained import TokenPackerPreTrainedModel
from tokenpacker.hf.vision_encoder import TOWER_STATES, build_spare_layers, build_vision_tower, encode_tiles
from tokenpacker.projectors.mixed import pack_tiles
from tokenpacker.regions import RegionEncoder, scatter_region_tokens
from tokenpacker.sequence import scatter_image_tokens

OLD_ARGUMENTS = {"packed_tokens", "region_tokens"}  # of version 0.1.0; language models take any argument in silence
TEXT_TOKEN = -1  # stands for ids that are no placeholders, where only embeddings were given


class TokenPackerModel(TokenPackerPreTrainedModel, LlavaModel):
    """LLaVA's model with any registered projector, tiles, scale factors per tile, and regions; without the head.

    `vision_chunk_tiles` bounds how many tiles pass a tower at once that is not trained; None takes all. Set None where
    every process must call it equally often, as under DeepSpeed ZeRO-3, and for `torch.export`.
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
        """Packed tokens of tiles (N, 3, h, w) as `pooler_output`, and `region_tokens` (R, D) of regions.

        No tiles, (0, 3, h, w), give no tokens, but a blank tile is encoded: the projector then gets a gradient of zero
        on every process of a distributed run, and no process waits for another. The same holds for no regions,
        (0, P, L).

        Args:
            scale_factor: of all tiles; None takes those in `scale_factors`, or the projector's own.
            scale_factors: (N,), one per tile, as the processor makes them. A compiled or exported graph holds for one
                scale factor, see `resolve_scale_factors`.
            tile_index: (N,), which of the tiles comes when, for tiles (U, 3, h, w) of which each is encoded once.
            region_cells: (R, P, L) weights of the patches of each region's image; see `regions.RegionEncoder`.
            region_first_tile: (R,) where the tiles of the region's image begin, in their order of use.
            kwargs: further arguments of the vision tower, such as `output_hidden_states`.

        Raises:
            ValueError: for tiles of another size than the vision tower's, scale factors that do not fit the tiles,
                and regions that do not fit them or that the model does not know.
        """
        num_tiles = pixel_values.shape[0]
        self._check_regions(num_tiles, region_cells, region_first_tile)
        own = getattr(getattr(self.multi_modal_projector, "config", None), "scale_factor", None)
        factors = resolve_scale_factors(scale_factor, scale_factors, own)
        if num_tiles == 0:
            pixel_values = pixel_values.new_zeros(1, *pixel_values.shape[1:])
            factors = None
        by_config = {name: getattr(self.vision_tower.config, name, None) for name in TOWER_STATES}
        asked = _tower_arguments(by_config | kwargs)
        states = BaseModelOutput()
        if asked:
            features, states = self._encode(pixel_values, **asked)
        else:
            features = self.vision_features(pixel_values)
        packed = pack_tiles(
            self.multi_modal_projector, _beside(self.multi_modal_projector, features), factors, tile_index
        )
        regions = None
        if region_cells is not None and region_first_tile is not None:
            regions = self._region_tokens(features, region_cells, region_first_tile, tile_index)
        return ImageFeatures(
            last_hidden_state=features.query[:num_tiles],
            pooler_output=packed if num_tiles else packed[:0],
            hidden_states=states.hidden_states,
            attentions=states.attentions,
            region_tokens=regions,
        )

    def get_region_features(
        self, pixel_values: Tensor, region_cells: Tensor, region_first_tile: Tensor, tile_index: Tensor | None = None
    ) -> Tensor:
        """(R, D) region tokens alone, where the images are known already. As `get_image_features`."""
        self._check_regions(pixel_values.shape[0], region_cells, region_first_tile)
        features = self.vision_features(pixel_values)
        return self._region_tokens(features, region_cells, region_first_tile, tile_index)

    def require_region_encoder(self) -> RegionEncoder:
        """The region encoder. Raises ValueError for a model that has none."""
        if self.region_encoder is None:
            raise ValueError(
                "regions were given but the model does not know regions; use one that does, or give it an untrained"
                " region encoder with tokenpacker.hf.add_regions"
            )
        return self.region_encoder

    def _check_regions(self, num_tiles: int, cells: Tensor | None, first_tile: Tensor | None) -> None:
        """Raises ValueError for regions that are given in part, without tiles, or to a model that knows none."""
        if cells is None and first_tile is None:
            return
        self.require_region_encoder()
        if cells is None or first_tile is None:
            raise ValueError(
                "region_cells need region_first_tile, and this needs those; pass both as the processor made them"
            )
        if cells.shape[0] and not num_tiles:
            raise ValueError(
                f"region_cells hold {cells.shape[0]} regions but pixel_values hold no tiles; pass the tiles of the"
                " regions' images"
            )

    def _region_tokens(
        self, features: VisionFeatures, cells: Tensor, first_tile: Tensor, tile_index: Tensor | None
    ) -> Tensor:
        encoder = self.require_region_encoder()
        return encoder(_beside(encoder, features), cells, first_tile, tile_index)

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

        A row may hold several samples that do not see each other; see `packing.separate_samples`.

        Args:
            input_ids: (B, S) with the placeholders wherever a packed token or a region token belongs.
            pixel_values: (N, 3, h, w), the tiles of all images in the order of their placeholders.
            past_key_values: the cache under its name before transformers 5.24.
            inputs_embeds: (B, S, D) instead of `input_ids`; placeholders are found by their embeddings.
            scale_factor: see `get_image_features`, as for the five that follow.
            mm_encoder_outputs: `{"image": ...}` with the output of an earlier `get_image_features` instead of
                `pixel_values`; without `pooler_output` if the images are in the cache already.

        Raises:
            ValueError: when inputs exclude each other, or placeholders and what belongs there differ in number.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        for name in OLD_ARGUMENTS & kwargs.keys():
            raise ValueError(f"{name} is given as mm_encoder_outputs={{'image': ImageFeatures(...)}} now")
        tiles = {"tile_index": tile_index, "region_cells": region_cells, "region_first_tile": region_first_tile}
        images = find_encoded(mm_encoder_outputs, pixel_values, tiles)
        if pixel_values is not None:
            images = self.get_image_features(
                pixel_values, scale_factor, scale_factors, **tiles, return_dict=True, **_tower_arguments(kwargs)
            )
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if images is not None:
            inputs_embeds = self._scatter(inputs_embeds, input_ids, images)
        context = {"attention_mask": attention_mask, "position_ids": position_ids}
        context |= name_cache(cache, past_key_values) | kwargs
        outputs = self.language_model(inputs_embeds=inputs_embeds, return_dict=True, **separate_samples(context))
        return TokenPackerModelOutput(**outputs, **image_fields(images))

    def _scatter(self, embeddings: Tensor, input_ids: Tensor | None, images: ImageFeatures) -> Tensor:
        """(B, S, D) embeddings with packed tokens and region tokens in their places.

        Raises:
            ValueError: as `forward`, and for region tokens that the model does not know.
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


def resolve_scale_factors(
    scale_factor: int | None, scale_factors: Tensor | None, own: int | None
) -> int | list[int] | None:
    """The scale factors of a call: one for all tiles, or one for each; None for the projector's own.

    A graph cannot depend on numbers in a tensor: while one is traced, all tiles have `scale_factor`, or the projector's
    `own`, and the graph checks that `scale_factors` say the same.

    Raises:
        ValueError: when one for all is given beside others for each.
    """
    if scale_factors is None:
        return scale_factor
    if torch.compiler.is_compiling():
        assumed = own if scale_factor is None else scale_factor
        if assumed is not None:
            torch_compilable_check((scale_factors == assumed).all(), "compile with the scale_factor of the inputs")
        return assumed
    factors = torch.as_tensor(scale_factors).flatten().tolist()
    if scale_factor is not None and set(factors) - {scale_factor}:
        raise ValueError(
            f"scale_factor={scale_factor} was given with inputs that the processor made for scale factors"
            f" {sorted(set(factors))}; leave scale_factor out, the inputs carry their own"
        )
    return factors


def find_encoded(
    mm_encoder_outputs: dict[str, ImageFeatures] | None, pixel_values: Tensor | None, tiles: dict[str, Any]
) -> ImageFeatures | None:
    """The images of `mm_encoder_outputs`, if they were encoded before.

    Raises:
        ValueError: for images that are given both encoded and as pixels, and for inputs about tiles without tiles.
    """
    given = mm_encoder_outputs or {}
    images = given.get("image")
    if set(given) - {"image"} or not (images is None or hasattr(images, "pooler_output")):
        raise ValueError(
            f"mm_encoder_outputs holds {', '.join(map(str, given))}; pass {{'image': ...}} with the output of"
            " get_image_features"
        )
    if pixel_values is not None:
        if images is not None:
            raise ValueError("pass pixel_values or mm_encoder_outputs, not both: the latter replace the former")
        return None
    for name, value in tiles.items():
        if value is not None:
            raise ValueError(f"{name} was given without pixel_values, to which it belongs; pass both, or neither")
    return images


def _tower_arguments(kwargs: Any) -> dict[str, bool]:
    """Of a model's further arguments what they ask of the vision tower."""
    return {name: True for name in TOWER_STATES if kwargs.get(name)}


def _beside(module: nn.Module, features: VisionFeatures) -> VisionFeatures:
    """The features on the module's device; device maps may place encoder and projector apart.

    Offloaded weights are on the meta device; accelerate's hooks then bring weights and inputs together.
    """
    device = next(module.parameters()).device
    return features if device.type == "meta" else features.to(device)
