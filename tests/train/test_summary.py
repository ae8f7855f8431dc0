"""What a finished run leaves beside its model, and what is told before it starts."""

from __future__ import annotations

import numpy as np

from tokenpacker.train.config import ModelConfig, OptimizerConfig, TrainingConfig
from tokenpacker.train.finish import INK, LINE, draw_curve
from tokenpacker.train.paper_recipes import with_lora
from tokenpacker.train.preview import describe, preview


def test_the_curve_falls_where_the_loss_does():
    picture = np.asarray(draw_curve([(step, 10.0 - step) for step in range(10)]).convert("RGB"))
    blue = tuple(int(LINE[i : i + 2], 16) for i in (1, 3, 5))
    rows, cols = np.nonzero((picture == blue).all(axis=2))
    left, right = rows[cols < cols.min() + 20].mean(), rows[cols > cols.max() - 20].mean()
    assert left < right  # rows count downwards
    assert INK != LINE


def test_a_curve_of_one_step_is_a_dot_and_of_none_empty():
    blue = tuple(int(LINE[i : i + 2], 16) for i in (1, 3, 5))
    dots = [(np.asarray(draw_curve(losses)) == blue).all(axis=2).sum() for losses in ([], [(1, 0.5)])]
    assert dots[0] == 0
    assert dots[1] > 10


def test_a_preview_counts_what_lora_adds(tiny_model_dir, tiny_model):
    config = TrainingConfig(
        name="small",
        optimizer=OptimizerConfig(learning_rate=1e-3),
        train=("projector", "language_model"),
        model=ModelConfig(start=str(tiny_model_dir)),
        precision="float32",
    )
    shown = preview(config)
    projector = sum(parameter.numel() for parameter in tiny_model.model.multi_modal_projector.parameters())
    assert shown.parameters["projector"] == {"trainable": projector, "frozen": 0}
    assert shown.samples is None
    low_rank = preview(with_lora(config))
    # Two layers of width 32, 16 for keys and values, 64 in the MLP; rank 128.
    per_layer = (32 + 32) * 2 + (32 + 16) * 2 + (32 + 64) * 3
    assert low_rank.parameters["lora"]["trainable"] == 128 * per_layer * 2
    assert "lora" in describe(low_rank)
    assert low_rank.memory_gib["total"] > 0
