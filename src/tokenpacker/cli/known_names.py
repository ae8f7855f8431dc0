"""Names of recipes and annotation formats, so that an unknown one is refused without importing torch.

`tests/cli/test_known_names.py` compares them with the recipes and the formats.
"""

from itertools import product
from pathlib import Path

from tokenpacker.text import did_you_mean

SIZES, TILES = ("7b", "13b"), ("", "-hd9", "-hd16", "-hd25")
RECIPES = (
    *(f"align-{size}{tiles}{kind}" for size, tiles, kind in product(SIZES, TILES, ("", "-elastic"))),
    *(
        f"instruct-{size}{tiles}{kind}"
        for size, tiles, kind in product(SIZES, TILES, ("", "-elastic", "-lora", "-qlora"))
    ),
    *(f"region-{size}-hd9" for size in SIZES),
    *(f"region-instruct-{size}-hd9{kind}" for size, kind in product(SIZES, ("", "-lora", "-qlora"))),
    *(f"{stage}-tiny" for stage in ("align", "instruct", "region", "region-instruct")),
)
FORMATS = (
    *("coco", "refcoco", "refcoco+", "pascal-part", "part-imagenet", "visual-genome", "vcr"),
    *(f"osprey-{part}" for part in ("short", "posneg", "conversation", "detail", "part")),
)


def recipe_name(recipe: str) -> str:
    """A typer callback for the name of a recipe or the file of a config."""
    if recipe not in RECIPES and Path(recipe).suffix not in (".json", ".yaml", ".yml"):
        meant = did_you_mean(recipe, RECIPES)
        raise ValueError(f"recipe {recipe!r} is unknown; `tokenpacker train recipes` lists them{meant}")
    return recipe


def format_name(format: str) -> str:
    """A typer callback for the name of an annotation format, or `list`."""
    if format not in ("list", *FORMATS):
        raise ValueError(
            f"format {format!r} is unknown; use one of {', '.join(FORMATS)}{did_you_mean(format, FORMATS)}"
        )
    return format
