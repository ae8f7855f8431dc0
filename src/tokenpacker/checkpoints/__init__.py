"""Released checkpoints in the original layout: load them, convert them, write a model back.

    config.json, weights      -> `discovery` -> `original_checkpoint` -> `conversion` -> model, or its folder
    a model's folder of ours  -> `export`                                              -> config.json, weights

`tensor_names` maps names both ways, `weight_files` reads one file at a time, `model_folder` makes a folder appear
whole or not at all.
"""

from tokenpacker.checkpoints.conversion import convert, load_released
from tokenpacker.checkpoints.export import export_original

__all__ = ["convert", "export_original", "load_released"]
