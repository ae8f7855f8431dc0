"""The fixtures of a small training run."""

from training_fixtures import finished, packed_config, run_config, training_data

__all__ = ["finished", "packed_config", "run_config", "training_data"]
