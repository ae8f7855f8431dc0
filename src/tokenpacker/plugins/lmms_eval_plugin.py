"""The entry point `lmms_eval.models`: makes `lmms-eval --model tokenpacker` know the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """What lmms-eval registers. It imports the classes when it needs one."""
    from lmms_eval.models.registry_v2 import ModelManifest

    module = "tokenpacker.plugins.lmms_eval_model"
    return ModelManifest(
        "tokenpacker",
        chat_class_path=f"{module}.TokenPackerChat",
        simple_class_path=f"{module}.TokenPackerSimple",
    )
