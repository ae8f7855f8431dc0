"""Vision tower, projector, region encoder and language model as one: images, regions and text to hidden states.

Shapes: B samples, S sequence length, N tiles of all samples in order, T packed tokens per tile, R regions of all
samples in order, P tiles of an image at most, L patches of a tile, D language width. With `tile_index`, U different
tiles are given and N are used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, Cache

from tokenpacker import projectors
from tokenpacker.features import VisionFeatures
from tokenpacker.hf.config import TokenPackerConfig
from tokenpacker.hf.outputs import ImageFeatures, TokenPackerModelOutput, name_cache
from tokenpacker.hf.packing import separate_samples
from tokenpacker.hf.pretrained import TokenPackerPreTrainedModel
from tokenpacker.hf.vision_encoder import build_spare_layers, build_vision_tower, encode_tiles
from tokenpacker.regions import RegionEncoder, scatter_region_tokens
from tokenpacker.sequence import scatter_image_tokens


class TokenPackerModel(TokenPackerPreTrainedModel):
    """Vision tower, projector, region encoder where the config has one, and language model without its head.

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
        self.region_encoder = None if config.regions is None else RegionEncoder(config.regions)
        self._no_split_modules = [type(self.projector).__name__, RegionEncoder.__name__]  # each on one device
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
        self,
        pixel_values: Tensor,
        scale_factor: int | None = None,
        tile_index: Tensor | None = None,
        region_cells: Tensor | None = None,
        region_first_tile: Tensor | None = None,
        **kwargs: Any,
    ) -> ImageFeatures:
        """Packed tokens of tiles (N, 3, h, w) as `pooler_output` (N, T, D), and `region_tokens` (R, D) of regions.

        No tiles at all, (0, 3, h, w), give no tokens, but a blank tile goes through: so the projector gets a gradient,
        of zero, on every process of a distributed run, and none waits for another. So it is with no regions, (0, P, L).

        Args:
            tile_index: (N,), which of the tiles comes when, for tiles (U, 3, h, w) of which each is encoded once.
            region_cells: (R, P, L) weights of the patches of each region's image; see `regions.RegionEncoder`.
            region_first_tile: (R,) where the tiles of the region's image begin, in their order of use.

        Raises:
            ValueError: for tiles of another size than the vision tower's, a scale factor that cannot be, and regions
                that do not fit the tiles or that the model does not know.
        """
        num_tiles = pixel_values.shape[0]
        self._check_regions(num_tiles, region_cells, region_first_tile)
        if num_tiles == 0:
            pixel_values = pixel_values.new_zeros(1, *pixel_values.shape[1:])
        features = self.vision_features(pixel_values)
        packed = self.projector(features.to(_device_of(self.projector)), scale_factor)[:num_tiles]
        if tile_index is not None:
            packed = packed[tile_index.to(packed.device)]  # (U, T, D) -> (N, T, D)
        regions = None
        if region_cells is not None and region_first_tile is not None:
            regions = self._region_tokens(features, region_cells, region_first_tile, tile_index)
        return ImageFeatures(last_hidden_state=features.query[:num_tiles], pooler_output=packed, region_tokens=regions)

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
        return encoder(features.to(_device_of(encoder)), cells, first_tile, tile_index)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        packed_tokens: Tensor | None = None,
        scale_factor: int | None = None,
        tile_index: Tensor | None = None,
        region_cells: Tensor | None = None,
        region_first_tile: Tensor | None = None,
        region_tokens: Tensor | None = None,
        **kwargs: Any,
    ) -> TokenPackerModelOutput:
        """One pass of the language model over text and images.

        A row may hold several samples that do not see each other; see `packing.separate_samples`.

        Args:
            input_ids: (B, S) with the placeholders wherever a packed token or a region token belongs.
            pixel_values: (N, 3, h, w), the tiles of all images in the order of their placeholders.
            packed_tokens: (N, T, D) from an earlier `get_image_features`, instead of `pixel_values`.
            inputs_embeds: (B, S, D) instead of `input_ids`; images and regions must already stand in it.
            scale_factor: for this call; None takes the projector's own.
            tile_index: (N,), which of the tiles (U, 3, h, w) comes when; see `get_image_features`.
            region_cells: (R, P, L), regions in the order of their placeholders; see `get_image_features`.
            region_first_tile: (R,), likewise.
            region_tokens: (R, D) from an earlier `get_image_features` or `get_region_features`; without
                `packed_tokens` where the images are in the cache already.

        Raises:
            ValueError: when inputs exclude each other, or placeholders and what belongs there differ in number.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if pixel_values is None:
            refuse_without_tiles(tile_index=tile_index, region_cells=region_cells, region_first_tile=region_first_tile)
        else:
            refuse_beside_tiles(packed_tokens, region_tokens)
            images = self.get_image_features(pixel_values, scale_factor, tile_index, region_cells, region_first_tile)
            packed_tokens, region_tokens = images.pooler_output, images.region_tokens
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if packed_tokens is not None or region_tokens is not None:
            if input_ids is None:
                raise ValueError("images need input_ids to find their places; pass them instead of inputs_embeds")
            inputs_embeds = self._scatter(inputs_embeds, input_ids, packed_tokens, region_tokens)
        context = {"attention_mask": attention_mask, "position_ids": position_ids}
        context |= name_cache(cache, past_key_values)
        outputs = self.language_model(inputs_embeds=inputs_embeds, **separate_samples(context | kwargs))
        return TokenPackerModelOutput(**outputs, image_hidden_states=packed_tokens, region_hidden_states=region_tokens)

    def _scatter(
        self, embeddings: Tensor, input_ids: Tensor, packed_tokens: Tensor | None, region_tokens: Tensor | None
    ) -> Tensor:
        """(B, S, D) embeddings with packed tokens and region tokens in their places.

        Raises:
            ValueError: as `forward`, and for region tokens that the model does not know.
        """
        device, config = embeddings.device, self.config
        if packed_tokens is not None:
            embeddings = scatter_image_tokens(embeddings, input_ids, packed_tokens.to(device), config.image_token_id)
        if region_tokens is not None:
            self.require_region_encoder()
        elif self.region_encoder is None:
            return embeddings
        else:  # then there must be no placeholder
            region_tokens = embeddings.new_zeros(0, embeddings.shape[2])
        return scatter_region_tokens(embeddings, input_ids, region_tokens.to(device), config.region_token_id)


def refuse_without_tiles(**given: Tensor | None) -> None:
    """Raises ValueError for inputs that speak of tiles, where there are none."""
    for name, value in given.items():
        if value is not None:
            instead = "leave it out" if name == "tile_index" else "give region_tokens in its place"
            raise ValueError(f"{name} was given without pixel_values, to which it belongs; pass both, or {instead}")


def refuse_beside_tiles(packed_tokens: Tensor | None, region_tokens: Tensor | None) -> None:
    """Raises ValueError for what takes the place of tiles, where there are some."""
    if packed_tokens is not None:
        raise ValueError("pass pixel_values or packed_tokens, not both: the latter replace the former")
    if region_tokens is not None:
        raise ValueError(
            "region_tokens were given with pixel_values; give regions as region_cells and region_first_tile, or the"
            " images as packed_tokens"
        )


def _device_of(module: nn.Module) -> torch.device:
    """Where a module is; device maps may place encoder and projector apart."""
    return next(module.parameters()).device
