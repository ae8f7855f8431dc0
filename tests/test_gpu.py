"""On a GPU the package computes what it computes on a CPU: `python -m benchmarks.gpu` runs these where there is one.

GPU_TESTS_DEVICE=cpu runs them without a GPU. That tells whether the tests themselves work, and nothing about a GPU.
"""

from __future__ import annotations

import copy
import importlib.util
import os

import pytest
import torch

from tokenpacker import TokenPacker, TokenPackerProjectorConfig, VisionFeatures, projectors
from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor, four_bit_config
from tokenpacker.hub import carried_model_path
from tokenpacker.scenes import FinePrint

DEVICE = torch.device(os.environ.get("GPU_TESTS_DEVICE", "cuda"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"),
]

# Of the largest value. float32: two orders of summation. Half types: several roundings of 2**-9 and 2**-12 in a row.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 1e-2}
HALVES = (torch.bfloat16, torch.float16)
GRID = (24, 24)
SCALE_FACTORS = (2, 3, 4)


@pytest.fixture(autouse=True)
def whole_float32(monkeypatch):
    """cuDNN would compute a float32 convolution, such as the vision tower's first, with TF32's ten bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module")
def packer():
    """On the CPU."""
    torch.manual_seed(0)
    return TokenPacker(TokenPackerProjectorConfig(vision_dim=256, language_dim=512)).eval()


@pytest.fixture(scope="module")
def features():
    """Of four tiles."""
    generator = torch.Generator().manual_seed(1)
    query, levels = (torch.randn(4, 576, width, generator=generator) for width in (256, 4 * 256))
    return VisionFeatures(query, levels, GRID)


@pytest.fixture(scope="module")
def model():
    """The carried model on the CPU."""
    return TokenPackerForConditionalGeneration.from_pretrained(carried_model_path()).eval()


@pytest.fixture(scope="module")
def processor():
    return TokenPackerProcessor.from_pretrained(carried_model_path())


@pytest.fixture(scope="module")
def on_gpu(model):
    return copy.deepcopy(model).to(DEVICE)


def moved(features, dtype=torch.float32):
    return VisionFeatures(features.query.to(DEVICE, dtype), features.levels.to(DEVICE, dtype), features.patch_grid)


def difference(found, expected):
    """The largest difference, of the largest value."""
    return ((found.float().cpu() - expected.float()).abs().max() / expected.float().abs().max()).item()


def questions(processor, numbers=range(4), **kwargs):
    """A batch of pictures with a question about each."""
    samples = [FinePrint("test")[number] for number in numbers]
    talks = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.questions[0].text}]}]
        for sample in samples
    ]
    texts = [processor.apply_chat_template(talk, add_generation_prompt=True) for talk in talks]
    images = [[sample.image] for sample in samples]
    return processor(images=images, text=texts, padding=True, return_tensors="pt", **kwargs)


@torch.inference_mode()
def answers(model, inputs, device=DEVICE, **kwargs):
    """The ids of each greedy answer, up to its end."""
    inputs = inputs.to(device)
    rows = model.generate(**inputs, max_new_tokens=8, do_sample=False, **kwargs)[:, inputs["input_ids"].shape[1] :]
    text = model.config.text_config
    return [[id for id in row if id not in (text.eos_token_id, text.pad_token_id)] for row in rows.tolist()]


@pytest.mark.parametrize("scale", SCALE_FACTORS)
def test_the_projector_plain_or_folded_gives_what_it_gives_on_a_cpu(packer, features, scale):
    there = copy.deepcopy(packer).to(DEVICE)
    with torch.inference_mode():
        expected = packer(features, scale)
        for module in (there, there.fold(), packer.fold().to(DEVICE)):
            assert difference(module(moved(features), scale), expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", HALVES)
def test_the_folded_projector_in_half_precision_gives_what_it_gives_in_float32(packer, features, dtype):
    with torch.inference_mode():
        folded = copy.deepcopy(packer).to(DEVICE, dtype).fold()
        assert difference(folded(moved(features, dtype)), packer(features)) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", projectors.available())
@pytest.mark.parametrize("dtype", HALVES)
def test_a_projector_in_half_precision_gives_what_it_gives_in_float32(features, name, dtype):
    torch.manual_seed(0)
    widths = {"vision_dim": 256, "language_dim": 512, "num_levels": 4}
    projector = projectors.build(projectors.config_from_dict({"name": name, **widths})).eval().to(DEVICE)
    with torch.inference_mode():
        whole = projector(moved(features)).cpu()
        assert difference(projector.to(dtype)(moved(features, dtype)), whole) < TOLERANCE[dtype]


def test_gradients_are_those_of_a_cpu_and_in_bfloat16_nearly_so(packer, features):
    torch.manual_seed(2)
    towards = torch.randn(4, 64, 512)

    def gradients(device, dtype):
        there = copy.deepcopy(packer).to(device, dtype)
        given = VisionFeatures(features.query.to(device, dtype), features.levels.to(device, dtype), GRID)
        there(given, 3).backward(towards.to(device, dtype))
        return {name: parameter.grad for name, parameter in there.named_parameters()}

    expected = gradients("cpu", torch.float32)
    scale = max(gradient.abs().max() for gradient in expected.values())
    for dtype in (torch.float32, torch.bfloat16):
        for name, gradient in gradients(DEVICE, dtype).items():
            error = (gradient.float().cpu() - expected[name]).abs().max() / scale  # a key's bias has none of its own
            assert error < TOLERANCE[dtype], name


def test_a_compiled_projector_and_a_captured_one_give_what_the_plain_one_gives(packer, features):
    there, given = copy.deepcopy(packer).to(DEVICE), moved(features)
    with torch.inference_mode():
        plain = there(given, 2).cpu()
        backend = "inductor" if DEVICE.type == "cuda" else "eager"
        compiled = torch.compile(there, fullgraph=True, backend=backend)
        assert difference(compiled(given, 2), plain) < TOLERANCE[torch.float32]
        if DEVICE.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = there(given, 2)
            graph.replay()
            assert difference(captured, plain) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("scale", SCALE_FACTORS)
def test_greedy_answers_are_those_of_a_cpu(model, on_gpu, processor, scale):
    inputs = questions(processor, scale_factor=scale)
    expected = answers(model, inputs, "cpu", scale_factor=scale)
    assert answers(on_gpu, inputs, scale_factor=scale) == expected


@pytest.mark.parametrize("dtype", HALVES)
def test_the_model_in_half_precision_gives_nearly_the_logits_of_float32(model, processor, dtype):
    inputs = questions(processor, range(2))
    there = copy.deepcopy(model).to(DEVICE, dtype)
    with torch.inference_mode():
        whole = model(**inputs).logits
        half = there(**inputs.to(DEVICE)).logits
    real = inputs["attention_mask"].bool().cpu()
    assert difference(half.cpu()[real], whole[real]) < TOLERANCE[dtype]


def test_a_question_in_a_padded_batch_is_answered_as_alone(on_gpu, processor):
    together = answers(on_gpu, questions(processor))
    assert together == [answers(on_gpu, questions(processor, [number]))[0] for number in range(4)]


def test_regions_are_answered_as_on_a_cpu(image_of):
    folder = carried_model_path("tiny-regions")
    model = TokenPackerForConditionalGeneration.from_pretrained(folder).eval()
    processor = TokenPackerProcessor.from_pretrained(folder)
    text, box = "USER: <image>\nwhat is <mask>? ASSISTANT:", [20, 20, 90, 80]
    inputs = processor(images=image_of(120, 200), text=text, region_masks=[[box]], return_tensors="pt")
    expected = answers(model, inputs, "cpu")
    assert answers(model.to(DEVICE), inputs) == expected


@pytest.mark.parametrize("placement", ["one device", "auto", "parts apart"])
def test_a_device_map_changes_no_answer(model, processor, placement):
    index = DEVICE if DEVICE.index is not None or DEVICE.type == "cpu" else torch.device(DEVICE.type, 0)
    parts = [f"model.{name}" for name, _ in model.model.named_children()] + ["lm_head"]
    device_map = {
        "one device": {"": index},
        "auto": "auto",
        "parts apart": {name: "cpu" if "vision" in name else index for name in parts},
    }[placement]
    there = TokenPackerForConditionalGeneration.from_pretrained(carried_model_path(), device_map=device_map).eval()
    inputs = questions(processor, range(2))
    expected = answers(model, inputs, "cpu")
    assert answers(there, inputs) == expected


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_four_bits_are_of_the_language_model_alone_and_answer(processor):
    there = TokenPackerForConditionalGeneration.from_pretrained(
        carried_model_path(), device_map={"": DEVICE}, quantization_config=four_bit_config()
    )
    four_bit = {name for name, module in there.named_modules() if type(module).__name__ == "Linear4bit"}
    assert four_bit
    assert all(name.startswith("model.language_model.layers.") for name in four_bit)
    assert all(answers(there, questions(processor, range(2))))
