"""Released checkpoints in the original layout: loaded, converted, and written back."""

from tokenpacker.checkpoints.conversion import convert, load_released
from tokenpacker.checkpoints.export import export_original

__all__ = ["convert", "export_original", "load_released"]
