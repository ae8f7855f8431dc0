"""Every registered projector inside a whole model: built from parts, answering, saved, and initialised when missing."""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor
from tokenpacker.projectors import RECOMMENDED_TOKEN_PACKER, available


@pytest.fixture(params=[*available(), RECOMMENDED_TOKEN_PACKER], ids=str)
def model(request, tiny_model):
    config = tiny_model.config
    name, fields = request.param, {"resampler": {"query_grid": [4, 4]}}  # the tiny tower's patch grid is 8 x 8
    settings = name if isinstance(name, dict) else {"name": name, **fields.get(name, {})}
    return TokenPackerForConditionalGeneration.from_parts(
        AutoModel.from_config(config.vision_config),
        AutoModelForCausalLM.from_config(config.text_config),
        vision_levels=[2, 3, 4, 5],
        image_token_id=config.image_token_id,
        projector_config=settings,
    ).eval()


def test_it_answers_after_an_image_of_as_many_tokens_as_counted(model, tiny_tokenizer, image_of):
    processor = TokenPackerProcessor.from_config(model.config, tiny_tokenizer)
    inputs = processor([[image_of(64, 96)], []], ["<image>\nhi", "hello"], return_tensors="pt")
    num_places = int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert num_places == len(inputs["pixel_values"]) * model.config.projector.num_tokens((8, 8))
    assert model(**inputs).logits.isfinite().all()
    answer = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert answer.shape == (2, inputs["input_ids"].shape[1] + 2)


def test_it_comes_back_from_its_folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert again.config.projector == model.config.projector
    weights = model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.state_dict().items())
    pixels = torch.randn(1, 3, 32, 32)
    packed = model.get_image_features(pixels).pooler_output
    # weights read from a file are aligned otherwise in memory, and MKL may sum them in another order
    torch.testing.assert_close(again.get_image_features(pixels).pooler_output, packed)


def test_it_is_drawn_as_a_fresh_one_where_its_weights_are_missing(model, tmp_path):
    others = {name: tensor for name, tensor in model.state_dict().items() if ".multi_modal_projector." not in name}
    model.save_pretrained(tmp_path, state_dict=others)
    drawn = AutoModelForImageTextToText.from_pretrained(tmp_path).model.multi_modal_projector
    for name, parameter in model.model.multi_modal_projector.named_parameters():
        deviation, expected = (weights.std(correction=0).item() for weights in (drawn.get_parameter(name), parameter))
        # of a few dozen weights or more, the deviations of two draws agree within a third
        assert deviation == pytest.approx(expected, rel=0.33, abs=1e-6), name


def test_a_model_with_a_folded_projector_is_not_saved(tiny_model_dir, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(tiny_model_dir)
    own = model.model.multi_modal_projector
    model.model.multi_modal_projector = own.fold()
    with pytest.raises(ValueError, match="save the model before folding"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    model.model.multi_modal_projector = own
    model.save_pretrained(tmp_path)
