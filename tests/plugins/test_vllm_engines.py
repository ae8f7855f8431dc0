"""Engines that are not started as the model is: other defaults, 4 bits, two processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tokenpacker.hf import carried_model_path
from tokenpacker.images import load_image
from vllm_cases import Case, Transformers, answers, start

SIGN = Path(__file__).resolve().parents[2] / "docs" / "images" / "sign.png"
QUESTION = "<s>USER: <image> what number is in the red box? ASSISTANT:"
GROUP = 32  # weights with one scale


@pytest.fixture(scope="module")
def theirs():
    return Transformers(carried_model_path())


def test_options_of_the_engine_hold_until_a_request_has_its_own(theirs, image_of):
    from vllm.exceptions import VLLMValidationError

    engine = start(carried_model_path(), mm_processor_kwargs={"scale_factor": 4}, max_num_batched_tokens=512)
    image = image_of(192, 192)

    def ask(**options) -> list:
        return answers(engine, [Case(QUESTION, [image], options)])

    for given, meant in (({}, {"scale_factor": 4}), ({"scale_factor": 3}, {"scale_factor": 3})):
        assert ask(**given) == [theirs.answer(Case(QUESTION, [image], meant))]
    budget = {"max_image_tokens": 60}
    assert ask(**budget) == [theirs.answer(Case(QUESTION, [image], {"scale_factor": 4, **budget}))]
    with pytest.raises(VLLMValidationError, match="exceeds the pre-allocated encoder cache size"):
        ask(scale_factor=1)
    assert ask(scale_factor=4) == ask()


def test_auto_of_the_engine_and_of_a_request_gives_the_router_s_tiles(theirs, image_of):
    half = image_of(192, 192)
    half.paste("white", (0, 0, 192, 96))
    engine = start(carried_model_path(), mm_processor_kwargs={"scale_factor": "auto"}, max_num_batched_tokens=512)
    case = Case(QUESTION, [half], {})
    assert answers(engine, [case]) == [theirs.answer(Case(QUESTION, [half], {"scale_factor": "auto"}))]
    for options in ({"scale_factor": 4}, {"scale_factor": "auto", "max_image_tokens": 20}):
        assert answers(engine, [Case(QUESTION, [half], options)]) == [theirs.answer(Case(QUESTION, [half], options))]


@pytest.mark.parametrize(
    ("options", "message"), [({"scale_facto": 4}, "did you mean scale_factor"), ({"scale_factor": 50}, "patch_grid")]
)
def test_an_engine_does_not_start_with_options_that_it_cannot_honour(options, message):
    with pytest.raises(ValueError, match=message):
        start(carried_model_path(), mm_processor_kwargs=options)


@pytest.fixture
def four_bit(tmp_path):
    """The model with its language model in 4 bits, as vLLM reads it, and with the same weights in full."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    packed, plain = tmp_path / "packed", tmp_path / "plain"
    for folder in (packed, plain):
        shutil.copytree(carried_model_path(), folder)
    tensors, spelt_out = load_file(packed / "model.safetensors"), {}
    for name, weight in list(tensors.items()):
        spelt_out[name] = weight
        if "language_model.layers" in name and name.endswith("_proj.weight"):
            groups = tensors.pop(name).float().unflatten(1, (-1, GROUP))  # (rows, groups, GROUP)
            scales = (groups.abs().amax(2, keepdim=True) / 7).bfloat16()
            steps = (groups / scales.float()).round().clamp(-8, 7)
            spelt_out[name] = (steps * scales.float()).flatten(1)
            stem = name.removesuffix("weight")
            tensors[f"{stem}weight_packed"] = pack_to_int32(steps.flatten(1).to(torch.int8), 4)
            tensors[f"{stem}weight_scale"] = scales.flatten(1)
            tensors[f"{stem}weight_shape"] = torch.tensor(weight.shape)
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    save_file(spelt_out, plain / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    (packed / "config.json").write_text(json.dumps(config))
    return packed, plain


def test_a_language_model_in_4_bits_and_the_rest_in_16_reads_a_sign(four_bit):
    packed, plain = four_bit
    case = Case(QUESTION, [load_image(SIGN)])
    # vLLM's product of 4-bit weights on a CPU has no float32
    assert answers(start(packed, dtype="bfloat16"), [case]) == [Transformers(plain).answer(case)]


def test_a_model_with_regions_answers_but_a_region_is_refused(image_of, tmp_path):
    from tokenpacker.hf import add_regions

    made = Transformers(carried_model_path())
    add_regions(made.model, made.processor)
    made.model.save_pretrained(tmp_path)
    made.processor.save_pretrained(tmp_path)
    engine, case = start(tmp_path), Case(QUESTION, [image_of(96, 190)])
    assert answers(engine, [case]) == [Transformers(tmp_path).answer(case)]
    for images in ([], case.images):
        marks = "<image> " * len(images)
        with pytest.raises(ValueError, match="<mask> stands for a region, which vLLM cannot serve"):
            answers(engine, [Case(f"<s>USER: {marks}what is <mask>? ASSISTANT:", images)])


def test_other_towers_language_models_and_projectors_are_served(image_of, tmp_path):
    from conftest import byte_tokenizer
    from tokenpacker.hf import TokenPackerConfig, TokenPackerForConditionalGeneration, TokenPackerProcessor

    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_hidden_layers": 5}
    vision = {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 4, **sizes}
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    text = {"model_type": "qwen2", "vocab_size": len(tokenizer), "num_key_value_heads": 1, "tie_word_embeddings": True}
    projector = {"name": "resampler", "num_heads": 2}
    config = TokenPackerConfig(
        vision, text | sizes | ids, projector_config=projector, vision_levels=[4], image_token_id=3
    )
    torch.manual_seed(0)
    TokenPackerForConditionalGeneration(config).save_pretrained(tmp_path)
    TokenPackerProcessor.from_config(config, tokenizer, image_mode="slice").save_pretrained(tmp_path)
    cases = [Case("<s>a <image> b", [image_of(70, 90)]), Case("<s>a <image> b", [image_of(30, 30, 1)])]
    theirs = Transformers(tmp_path)
    assert answers(start(tmp_path, max_model_len=4096), cases) == [theirs.answer(case) for case in cases]


def test_two_processes_that_share_the_language_model_give_the_same_answers(theirs, image_of):
    cases = [
        Case(QUESTION, [image_of(200, 300)]),
        Case("<s>USER: <image> what is it? ASSISTANT:", [image_of(96, 190)], {"scale_factor": 3}),
    ]
    engine = start(carried_model_path(), tensor_parallel_size=2)
    assert answers(engine, cases) == [theirs.answer(case) for case in cases]
