"""The model of a run: joined or continued, the right parts frozen, the image rules of the run in its processor."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tokenpacker.checkpoints import convert
from tokenpacker.hf import TokenPackerProcessor, carried_model_path
from tokenpacker.train.assemble import assemble, load_processor, save_projector
from tokenpacker.train.config import LoraConfig, ModelConfig, OptimizerConfig, TrainingConfig
from tokenpacker.train.optimizer import part_groups, part_of

OPTIMIZER = OptimizerConfig(learning_rate=1e-3, part_learning_rates={"projector": 1e-4})


@pytest.fixture
def config(base_folder, tower_folder):
    """Stage 1 around the small tower and LLaMA of the checkpoint tests."""
    model = ModelConfig(
        vision_tower=str(tower_folder),
        language_model=str(base_folder),
        projector={"name": "token-packer", "scale_factor": 2},
        image_mode="pad",
        chat_format="plain",
    )
    return TrainingConfig(name="small", optimizer=OPTIMIZER, train=("projector",), model=model, precision="float32")


def test_parts_are_joined_around_a_fresh_projector_that_the_seed_decides(config, complete_tensors):
    model, processor = assemble(config)
    assert torch.equal(model.lm_head.weight, complete_tensors["lm_head.weight"])
    again, _ = assemble(config)
    other, _ = assemble(replace(config, seed=1))
    weights = [m.model.multi_modal_projector.query_proj.weight for m in (model, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert model.config.vision_levels == [12, 16, 22, 23]
    assert processor.image_processor.image_mode == "pad"
    assert processor.image_processor.grid_list == "all"  # sound, as nothing released asks for more


def test_only_what_shall_learn_does(config):
    for train in (("projector",), ("projector", "language_model")):
        model, _ = assemble(replace(config, train=train))
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (part_of(name) in train), name


def test_each_part_has_its_rate(config):
    model, _ = assemble(replace(config, train=("projector", "language_model")))
    rates = {group["name"]: group["lr"] for group in part_groups(model, OPTIMIZER)}
    assert rates == {"projector": 1e-4, "language_model": 1e-3}


def test_what_learns_is_float32_and_what_is_frozen_bfloat16(config):
    model, _ = assemble(replace(config, precision="bfloat16"))
    assert {p.dtype for p in model.model.multi_modal_projector.parameters()} == {torch.float32}
    assert {p.dtype for p in model.model.vision_tower.parameters()} == {torch.bfloat16}


def test_lora_trains_updates_and_the_projector(config):
    model, _ = assemble(replace(config, lora=LoraConfig(rank=4, alpha=8)))
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("lora_A" in name for name in learning)
    assert all("lora_" in name or ".multi_modal_projector." in name for name in learning)
    assert not any("vision_tower" in name for name in learning)


def test_a_run_continues_from_a_model_and_keeps_its_rules(config, tiny_model_dir, make_complete, tmp_path):
    start = replace(config, model=ModelConfig(start=str(tiny_model_dir)))
    assert assemble(start)[1].chat_template.startswith("{%")
    original, converted = str(make_complete()), str(tmp_path / "converted")
    for read in (assemble, lambda config: load_processor(config.model)):
        with pytest.raises(ValueError, match="in the original layout; first run: tokenpacker convert"):
            read(replace(config, model=ModelConfig(start=original)))
    convert(original, converted)
    released = replace(config, model=ModelConfig(start=converted))
    _, processor = assemble(released)
    assert (processor.image_processor.grid_list, processor.row_separator) == ("released", "unknown")
    sound = replace(config, model=ModelConfig(start=converted, grid_list="all", row_separator="newline"))
    _, processor = assemble(sound)
    assert (processor.image_processor.grid_list, processor.row_separator) == ("all", "newline")


def test_the_processor_comes_without_weights(config):
    processor = load_processor(config.model)
    assert processor.image_layout((16, 16)).num_tokens == 4
    with pytest.raises(ValueError, match="does not exist"):
        load_processor(ModelConfig(start="./nowhere"))


def test_pixels_are_normalised_as_the_tower_was_trained(config, tower_folder, tmp_path):
    assert load_processor(config.model).image_processor.image_mean[0] == pytest.approx(0.4815, abs=1e-4)  # CLIP's
    other = tmp_path / "tower"
    shutil.copytree(tower_folder, other)
    (other / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    images = load_processor(replace(config.model, vision_tower=str(other))).image_processor
    assert (images.image_mean, images.image_std) == ([0.5] * 3, [0.25] * 3)


def test_the_projector_reads_the_levels_that_are_asked_for(config):
    model, _ = assemble(replace(config, model=replace(config.model, vision_levels=(3, -2))))
    assert model.config.vision_levels == [3, 23]


def test_a_projector_of_stage_1_goes_on_in_stage_2(config, tmp_path):
    first, _ = assemble(replace(config, seed=5, model=replace(config.model, projector={"name": "mlp"})))
    save_projector(first, tmp_path / "projector.safetensors")
    weights = str(tmp_path / "projector.safetensors")
    second, _ = assemble(replace(config, seed=6, model=replace(config.model, projector_weights=weights)))
    expected = first.model.multi_modal_projector.state_dict()
    assert all(tensor.equal(expected[name]) for name, tensor in second.model.multi_modal_projector.state_dict().items())
    assert second.config.projector == first.config.projector
    whole = replace(config.model, projector_weights=weights)
    assert load_processor(whole).image_layout((16, 16)).num_tokens == 16  # an MLP keeps every patch


def test_another_tokenizer_gets_one_more_token(config, tmp_path, tiny_tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(plain)
        )
    ).save_pretrained(tmp_path / "lm")
    plain.save_pretrained(tmp_path / "lm")
    model, processor = assemble(replace(config, model=replace(config.model, language_model=str(tmp_path / "lm"))))
    assert processor.tokenizer.pad_token_id not in (None, processor.tokenizer.eos_token_id)  # or no end were learned
    assert model.config.image_token_id == processor.image_token_id < model.get_input_embeddings().num_embeddings
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "lm").config.vocab_size == len(plain)


def test_a_run_that_continues_from_a_model_drops_the_router_that_was_fitted_to_its_weights():
    assert TokenPackerProcessor.from_pretrained(carried_model_path()).router is not None
    assert load_processor(ModelConfig(start="tiny", chat_format="bare")).router is None
