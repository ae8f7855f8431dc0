"""Public region annotations to rows that training reads: `tokenpacker data regions`, one module per format.

    annotations -> `entries` (JSON in bounded memory) -> a reader of the format -> rows with `regions` -> a JSONL file

A row is a LLaVA row with one more key: `regions` holds, for each image, its regions in the order of their `<mask>`.
"""

from tokenpacker.data.annotations.write_rows import FORMATS, Conversion, Format, write_rows

__all__ = ["FORMATS", "Conversion", "Format", "write_rows"]
