"""The model that is measured or planned, as sizes without weights, and its projectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from transformers import CLIPVisionConfig, LlamaConfig

from tokenpacker import projectors
from tokenpacker.checkpoints.settings import MODEL_TYPES, ReleasedSettings, language_model_config
from tokenpacker.checkpoints.weight_files import read_json
from tokenpacker.hf.configuration import TokenPackerConfig
from tokenpacker.hub import SHAPES as NAMED
from tokenpacker.projectors import ProjectorConfig, config_from_dict
from tokenpacker.sequence import ImageLayout, plan_layout
from tokenpacker.speed.flops import FlopTable
from tokenpacker.tiling import GridList

Mode = Literal["one-tile", "slice"]

TOKEN_PACKER, AVERAGE_POOL, MLP = "token-packer", "average-pool", "mlp"
DEFAULT_SCALE_FACTOR = 2

# Sizes in the configs that OpenAI and LMSYS published with the weights.
CLIP_LARGE_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
}
VICUNA = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
# No published model: the patch grid of CLIP-L/336, small enough otherwise to be timed on two cores.
SMALL_VISION = CLIP_LARGE_336 | {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
}
SMALL_TEXT = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
LLAMA_UNKNOWN_ID = 0  # the image token where there is no tokenizer; any id of the vocabulary would do


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """A model without its weights.

    Args:
        name: for reports.
        sliced: whether the model cuts images into tiles (`slice`) or takes them in one piece.
        max_tiles: limit of rows*cols where images are cut.
    """

    name: str
    config: TokenPackerConfig
    sliced: bool = False
    max_tiles: int = 9
    grid_list: GridList = "all"

    @property
    def own_mode(self) -> Mode:
        """How the model takes an image."""
        return "slice" if self.sliced else "one-tile"

    @property
    def context(self) -> int | None:
        """Most tokens of the language model; None where its config does not say."""
        return getattr(self.config.text_config, "max_position_embeddings", None)

    @cached_property
    def table(self) -> FlopTable:
        """The counts of operations, made once."""
        return FlopTable(self.config)

    def layout(self, candidate: Candidate, image_size: tuple[int, int] | None, mode: Mode | None = None) -> ImageLayout:
        """The token sequence of an image of (height, width); None takes one as large as a tile.

        Raises ValueError for an image or a scale factor that does not fit.
        """
        return plan_layout(
            self.config.tile_size if image_size is None else image_size,
            self.config.tile_size,
            candidate.config.token_grid(self.config.patch_grid, candidate.scale_factor),
            sliced=(mode or self.own_mode) == "slice",
            max_tiles=self.max_tiles,
            grid_list=self.grid_list,
        )


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A projector to be measured or planned.

    Args:
        scale_factor: for each call; None takes the config's own.
        trained: True for the model's own module with its weights; the others are fresh.
    """

    config: ProjectorConfig
    scale_factor: int | None = None
    trained: bool = False

    @property
    def name(self) -> str:
        """The projector's registered name."""
        return self.config.name

    @property
    def packs(self) -> int | None:
        """The scale factor in force; None for a projector without one."""
        return self.scale_factor or getattr(self.config, "scale_factor", None)


def named_shapes(name: str) -> Shapes:
    """CLIP-L/336 with Vicuna-7B or 13B (`7b`, `13b`), or `small`."""
    vision, text = (SMALL_VISION, SMALL_TEXT) if name == "small" else (CLIP_LARGE_336, VICUNA[name])
    text_config = LlamaConfig(**text, vocab_size=32000, max_position_embeddings=4096)
    config = TokenPackerConfig(CLIPVisionConfig(**vision), text_config, image_token_id=LLAMA_UNKNOWN_ID)
    return Shapes(name=name, config=config)


def shapes_of_file(path: Path) -> Shapes:
    """Shapes from a JSON file: what `TokenPackerConfig` takes, such as a model folder's config.json.

    Raises:
        ValueError: when the file is damaged, or sizes do not fit together.
    """
    content = read_json(path)
    missing = [key for key in ("vision_config", "text_config") if not isinstance(content.get(key), dict)]
    if missing:
        raise ValueError(f"{path} has no {missing[0]}; write {{'vision_config': {{...}}, 'text_config': {{...}}}}")
    return Shapes(name=path.stem, config=_checked(lambda: TokenPackerConfig.from_dict(content), path))


def shapes_of_folder(folder: Path, name: str) -> Shapes:
    """Shapes of a model folder, in this package's layout or the original's; no weights are read.

    A folder in the original layout does not tell its vision tower's sizes; all released models have CLIP-L/336.

    Raises:
        ValueError: when files are missing, damaged, or of another kind of model.
    """
    path = folder / "config.json"
    content = read_json(path)
    if content.get("model_type") in MODEL_TYPES:
        return _released_shapes(content, str(path), name)
    if content.get("model_type") != TokenPackerConfig.model_type:
        raise ValueError(
            f"model {name} is of the kind {content.get('model_type')!r}, not {TokenPackerConfig.model_type!r}; name"
            f" another, or use {', '.join(NAMED)}"
        )
    config = _checked(lambda: TokenPackerConfig.from_pretrained(folder), path)
    images = read_json(folder / "processor_config.json").get("image_processor", {})
    return Shapes(
        name=name,
        config=config,
        sliced=images.get("image_mode", "slice") == "slice",
        max_tiles=images.get("max_tiles", 9),
        grid_list=images.get("grid_list", "all"),
    )


def candidates(
    shapes: Shapes, names: Sequence[str] = (), scale_factor: int | None = None, *, trained: bool = False
) -> list[Candidate]:
    """The named projectors, then average pooling to as many tokens, then the MLP that keeps all tokens.

    Args:
        names: registered projectors; empty takes the model's own.
        scale_factor: of all but the MLP; None takes the first projector's own.
        trained: whether the model's own projector has its weights, so that no fresh one is made.

    Raises:
        ValueError: for an unknown name, and for a scale factor that does not fit the patch grid.
    """
    own = shapes.config.projector
    asked = [
        _candidate(shapes, name, scale_factor, trained and name == own.name)
        for name in dict.fromkeys(names or (own.name,))
    ]
    scale = scale_factor or next((one.packs for one in asked if one.packs), None) or DEFAULT_SCALE_FACTOR
    for name in (AVERAGE_POOL, MLP):
        if name in projectors.available() and name not in {one.name for one in asked}:
            asked.append(_candidate(shapes, name, scale))
    for one in asked:
        one.config.token_grid(shapes.config.patch_grid, one.scale_factor)  # refuses what cannot be
    return asked


def _candidate(shapes: Shapes, name: str, scale_factor: int | None, trained: bool = False) -> Candidate:
    own = shapes.config.projector
    scale_factor = None if name == MLP else scale_factor
    if trained:
        return Candidate(config=own, scale_factor=scale_factor, trained=True)
    widths = {key: getattr(own, key) for key in ("vision_dim", "language_dim", "num_levels")}
    config = own if name == own.name else config_from_dict({"name": name, **widths})
    if scale_factor is not None:
        config = config_from_dict(config.to_dict() | settings_at(config, shapes.config.patch_grid, scale_factor))
    return Candidate(config=config)


def settings_at(config: ProjectorConfig, patch_grid: tuple[int, int], scale_factor: int) -> dict[str, Any]:
    """The settings of this kind of projector for a scale factor and (rows, cols) of patches, JSON-ready.

    There are as many learned queries as other projectors have tokens, and as many learned positions as patches.
    """
    rows, cols = patch_grid
    settings = {
        "scale_factor": scale_factor,
        "query_grid": [-(-rows // scale_factor), -(-cols // scale_factor)],
        "position_grid": [rows, cols],
    }
    return {name: value for name, value in settings.items() if hasattr(config, name)}


def _released_shapes(content: dict[str, Any], where: str, name: str) -> Shapes:
    settings = ReleasedSettings.read(content, where)
    config = TokenPackerConfig(
        CLIPVisionConfig(**CLIP_LARGE_336),
        language_model_config(content, where),
        projector_config={"name": TOKEN_PACKER, "scale_factor": settings.scale_factor},
        vision_query_level=settings.query_level,
        image_token_id=LLAMA_UNKNOWN_ID,
    )
    sliced = settings.image_mode == "slice"
    return Shapes(name=name, config=config, sliced=sliced, max_tiles=settings.max_tiles, grid_list="released")


def _checked(read: Any, path: Path) -> TokenPackerConfig:
    """The config that `read` returns. Raises ValueError with the name of the file if that fails."""
    try:
        config = read()
        config.projector.token_grid(config.patch_grid)
    except Exception as error:  # transformers validates with several kinds
        raise ValueError(f"{path} is no model's config ({' '.join(str(error).split())[:300]}); correct it") from error
    return config
