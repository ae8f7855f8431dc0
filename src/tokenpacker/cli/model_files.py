"""`--model` to a folder, and what its JSON files say. Without torch and without weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenpacker.hub import fetch, is_released

if TYPE_CHECKING:
    from tokenpacker.projectors import ProjectorConfig
    from tokenpacker.sequence import ImageLayout
    from tokenpacker.tiling import GridList

CARRIED, CARRIED_REGIONS = "tiny", "tiny-regions"  # the default model, and the one for questions about regions
MODEL_TYPE, RELEASED_TYPES = "tokenpacker", ("llava", "llava_llama")
CONFIG_FILES = ["config.json", "processor_config.json"]
PROCESSOR_FILES = ["*.json", "*.jinja", "tokenizer.model"]
MODEL_FILES = [*PROCESSOR_FILES, "*.safetensors"]
REMEDY = "give a folder that TokenPackerForConditionalGeneration.save_pretrained wrote, or leave --model out"


def find_model(model: str | None, files: list[str] = MODEL_FILES) -> Path:
    """The folder of `--model`: a carried model, a local folder, or the cached copy of a model from the hub.

    Args:
        files: patterns of the files to fetch from the hub.

    Raises:
        ValueError: if there is no such model, or it is of another kind.
    """
    name = CARRIED if model is None else model
    if is_released(name) and not Path(name).exists():
        raise ValueError(f"model {name} is in the original layout; first run: tokenpacker convert {name} DST")
    folder = fetch(name, ["config.json"], REMEDY)  # before gigabytes of another kind are fetched
    kind = read_json(folder / "config.json").get("model_type")
    if kind in RELEASED_TYPES:
        raise ValueError(f"model {folder} is in the original layout; first run: tokenpacker convert {folder} DST")
    if kind != MODEL_TYPE:
        raise ValueError(f"model {folder} is of the kind {kind!r}, not {MODEL_TYPE!r}; {REMEDY}")
    return fetch(name, files, REMEDY)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a model folder. Raises ValueError if it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"model {path.parent} has no {path.name}; {REMEDY}") from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} is damaged ({error}); fetch the model anew") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (no JSON object); fetch the model anew")
    return content


@dataclass(frozen=True)
class Geometry:
    """What decides an image's token count.

    Args:
        tile_size: (height, width) of a tile in pixels.
        patch_grid: (rows, cols) of patches in a tile.
        router: of `scale_factor="auto"`; None for a model without one.
    """

    tile_size: tuple[int, int]
    patch_grid: tuple[int, int]
    projector: ProjectorConfig
    image_mode: str = "slice"
    max_tiles: int = 9
    grid_list: GridList = "all"
    router: dict[str, Any] | None = None

    @classmethod
    def paper(cls, grid_list: GridList = "all") -> Geometry:
        """CLIP-L/336 in TokenPacker-HD: 24 x 24 patches of 14 pixels, up to 9 tiles, scale factor 2."""
        from tokenpacker.projectors import TokenPackerProjectorConfig

        projector = TokenPackerProjectorConfig(vision_dim=1024, language_dim=4096)
        return cls(tile_size=(336, 336), patch_grid=(24, 24), projector=projector, grid_list=grid_list)

    @classmethod
    def of_model(cls, folder: Path) -> Geometry:
        """Read from a model's processor config. Raises ValueError if that is missing or damaged."""
        from tokenpacker.projectors import config_from_dict

        path = folder / "processor_config.json"
        config = read_json(path)
        try:
            images = config["image_processor"]
            return cls(
                tile_size=(images["tile_size"][0], images["tile_size"][1]),
                patch_grid=(config["patch_grid"][0], config["patch_grid"][1]),
                projector=config_from_dict(config["projector_config"]),
                image_mode=images["image_mode"],
                max_tiles=images["max_tiles"],
                grid_list=images.get("grid_list", "all"),  # folders of version 0.1.0 do not say
                router=config.get("router"),
            )
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}); fetch the model anew") from None

    def check(self, scale_factor: int | str | None, max_image_tokens: int | None) -> None:
        """Raises ValueError for limits that no image can meet, and for "auto" without a router."""
        from tokenpacker.router import AUTO, own_router

        sure = own_router(self.router).coarsest if scale_factor == AUTO else scale_factor
        self.layout((1, 1), sure, max_image_tokens)

    def layout(
        self,
        image_size: tuple[int, int],
        scale_factor: Any = None,
        max_image_tokens: int | None = None,
        max_tiles: int | None = None,
    ) -> ImageLayout:
        """The token sequence of an image of (height, width). Raises ValueError for limits that no image can meet."""
        from tokenpacker.sequence import plan_layout

        return plan_layout(
            image_size,
            self.tile_size,
            self.projector.token_grid(self.patch_grid, scale_factor),
            sliced=self.image_mode == "slice",
            max_tiles=self.max_tiles if max_tiles is None else max_tiles,
            max_image_tokens=max_image_tokens,
            grid_list=self.grid_list,
        )
