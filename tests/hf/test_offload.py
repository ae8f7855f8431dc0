"""Parts on other devices than the rest: on the disk or in CPU memory, brought in by accelerate when they run."""

import pytest
import torch
from accelerate import cpu_offload

from tokenpacker.hf import TokenPackerForConditionalGeneration

PARTS = ("vision_tower", "multi_modal_projector", "region_encoder", "language_model")


@pytest.fixture(scope="module")
def inputs(region_model, image_of):
    _, processor = region_model
    text = "USER: <image>\nwhat is <mask>? ASSISTANT:"
    return processor(image_of(64, 96), text, region_masks=[[(0, 0, 40, 30)]], return_tensors="pt")


@pytest.fixture(scope="module")
def expected(region_model_dir, inputs):
    model = TokenPackerForConditionalGeneration.from_pretrained(region_model_dir).eval()
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("part", PARTS)
def test_a_part_on_the_disk_gives_the_same_logits(region_model_dir, inputs, expected, tmp_path, part):
    device_map = {f"model.{name}": "disk" if name == part else "cpu" for name in PARTS} | {"lm_head": "cpu"}
    model = TokenPackerForConditionalGeneration.from_pretrained(
        region_model_dir, device_map=device_map, offload_folder=tmp_path
    )
    offloaded = getattr(model.model, part)
    assert any(parameter.device.type == "meta" for parameter in offloaded.parameters())
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)


def test_little_memory_puts_parts_on_the_disk(region_model_dir, inputs, expected, tmp_path):
    model = TokenPackerForConditionalGeneration.from_pretrained(
        region_model_dir, device_map="auto", max_memory={"cpu": "120KB"}, offload_folder=tmp_path
    )
    assert "disk" in model.hf_device_map.values()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)


def test_weights_offloaded_to_the_cpu_give_the_same_logits(region_model_dir, inputs, expected):
    model = TokenPackerForConditionalGeneration.from_pretrained(region_model_dir).eval()
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)
