"""Readers of the files that benchmarks come in."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tokenpacker.evaluate.layouts.loaded import Loaded, Problem, gather

__all__ = ["Loaded", "Problem", "gather", "load_benchmark"]


def load_benchmark(name: str, data: Path | Literal["hub"], *, split: str | None = None) -> Loaded:
    """The questions of a benchmark.

    Args:
        name: as in `tokenpacker.evaluate.protocols`.
        data: folder with the files of LLaVA's evaluation documents, or with lmms-eval's data set in Parquet;
            `"hub"` loads the latter from the Hugging Face hub.
        split: None takes the one that published numbers are of, or the first that is there.

    Raises:
        ValueError: if the files are not there, or not whole.
    """
    from tokenpacker.evaluate.layouts.hub_tables import load_hub, load_table
    from tokenpacker.evaluate.layouts.llava import expected_files, load_llava

    if data == "hub":
        return load_hub(name, split)
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise ValueError(f"--data {folder} is no folder; give the folder of the benchmarks' files, or hub")
    loaded = load_llava(name, folder, split) or load_table(name, folder, split)
    if loaded is None:
        wanted = f"{name}, split {split}," if split else name
        llava = [f"LLaVA's {' or '.join(expected_files(name, folder, split))}"] if expected_files(name, folder) else []
        places = " or ".join([*llava, f"lmms-eval's Parquet files below {folder / name}"])
        command = f"tokenpacker data get {name} --to {folder}"
        raise ValueError(f"{folder} has no files of {wanted}; put {places} there, or run: {command}")
    return loaded
