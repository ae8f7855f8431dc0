"""The engine for one process and one model.

Question -> prepared_prompts -> packed_cache -> running_batch, row_cache -> row_sampling -> answer_text -> Piece
"""

from tokenpacker.serve.embedded.embedded_engine import EmbeddedEngine

__all__ = ["EmbeddedEngine"]
