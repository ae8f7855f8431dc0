"""Turns public region annotations into rows for training: `tokenpacker data regions`, one module per format.

    annotations -> `entries` (JSON in bounded memory) -> a format's reader -> rows with `regions` -> a JSONL file

A row is a LLaVA row with one more key: `regions` has, for each image, its regions in the order of their `<mask>`.
"""

from tokenpacker.data.annotations.write_rows import FORMATS, Conversion, Format, write_rows

__all__ = ["FORMATS", "Conversion", "Format", "write_rows"]
