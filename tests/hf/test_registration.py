"""What `import tokenpacker.hf` tells transformers, seen through the tools that read it."""

from __future__ import annotations

import pytest
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, pipeline
from transformers.cli.serving.model_manager import ModelManager
from transformers.models.auto import modeling_auto
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerModel, register


@pytest.mark.parametrize("auto_class", [AutoModelForImageTextToText, AutoModelForMultimodalLM])
def test_auto_classes_for_models_that_see_load_the_model(auto_class, tiny_model_dir):
    assert type(auto_class.from_pretrained(tiny_model_dir)) is TokenPackerForConditionalGeneration


def test_the_auto_class_for_base_models_loads_the_model_without_its_head(tiny_model_dir):
    assert type(AutoModel.from_pretrained(tiny_model_dir)) is TokenPackerModel


def test_transformers_serve_takes_the_model_for_one_that_sees(tiny_model, tiny_processor, tiny_model_dir):
    # it loads what stands in this table by its Auto class, and searches all else among its own classes
    assert tiny_model.config.model_type in modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    assert ModelManager.get_model_modality(tiny_model, processor=tiny_processor).name == "MULTIMODAL"


def test_a_pipeline_answers_about_a_picture_and_knows_the_model(tiny_model_dir, image_of, tmp_path):
    image_of(40, 60).save(tmp_path / "picture.png")
    content = [{"type": "image", "path": str(tmp_path / "picture.png")}, {"type": "text", "text": "What?"}]
    with CaptureLogger(logging.get_logger("transformers.pipelines.base")) as log:
        ask = pipeline("image-text-to-text", model=str(tiny_model_dir))
    assert "not supported" not in log.out
    answer = ask(text=[{"role": "user", "content": content}], max_new_tokens=4, return_full_text=False)
    assert isinstance(answer[0]["generated_text"], str)


def test_registering_twice_changes_nothing():
    before = dict(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    register()
    assert before == modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def test_what_version_0_1_0_had_in_hf_is_found_there():
    from tokenpacker import checkpoints, hf

    assert (hf.convert, hf.load_released, hf.export_original) == (
        checkpoints.convert,
        checkpoints.load_released,
        checkpoints.export_original,
    )
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        hf.nothing  # noqa: B018
