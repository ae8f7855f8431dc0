"""Readers of the files that benchmarks come in."""

from tokenpacker.evaluate.layouts.loading import Loaded, Problem, gather

__all__ = ["Loaded", "Problem", "gather"]
