import inspect

import pytest
import torch
from transformers import AutoModelForImageTextToText, CLIPVisionModel, LlamaForCausalLM

from tokenpacker.hf import TokenPackerForConditionalGeneration
from tokenpacker.hf.outputs import ImageFeatures
from tokenpacker.hf.versions import RECOMPUTATION


@pytest.fixture(scope="module")
def inputs(tiny_processor, image_of):
    images = [[image_of(64, 96)], [], [image_of(32, 32, 1), image_of(90, 40, 2)]]
    return tiny_processor(images, ["<image>\nhi", "hello", "<image> or <image>?"], return_tensors="pt")


def test_packed_tokens_stand_where_the_markers_are(tiny_model, tiny_processor, inputs):
    output = tiny_model(**inputs)
    packed = tiny_model.get_image_features(inputs["pixel_values"]).pooler_output
    assert packed.shape == (inputs["pixel_values"].shape[0], 16, 32)
    assert torch.equal(output.packed_tokens, packed)
    embeddings = tiny_model.get_input_embeddings()(inputs["input_ids"])
    embeddings[inputs["input_ids"] == tiny_processor.image_token_id] = packed.flatten(0, 1)
    expected = tiny_model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).logits
    torch.testing.assert_close(output.logits, expected)


def test_packed_tokens_can_be_given_instead_of_pixels(tiny_model, inputs):
    packed = tiny_model.get_image_features(inputs["pixel_values"]).pooler_output
    without = {key: value for key, value in inputs.items() if key != "pixel_values"}
    assert torch.equal(
        tiny_model(**without, mm_encoder_outputs={"image": ImageFeatures(pooler_output=packed)}).logits,
        tiny_model(**inputs).logits,
    )


def test_a_tokens_loss_reaches_its_own_images_pixels_only(tiny_model, tiny_processor, image_of):
    inputs = tiny_processor([[image_of(32, 32)], [image_of(32, 32, 1)]], ["<image>a", "<image>b"], return_tensors="pt")
    pixels = inputs["pixel_values"].requires_grad_()
    tiny_model(**inputs).logits[1].sum().backward()
    assert (pixels.grad[0] == 0).all()
    assert (pixels.grad[1] != 0).any()


def test_the_loss_is_that_of_the_labels(tiny_model, inputs):
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == tiny_model.config.image_token_id, -100)
    labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    output = tiny_model(**inputs, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


def test_only_asked_for_logits_are_computed(tiny_model, inputs):
    assert tiny_model(**inputs, logits_to_keep=1).logits.shape[1] == 1


@pytest.mark.parametrize(("vision", "text"), [("siglip", "llama"), ("clip", "qwen2"), ("siglip", "smollm3")])
def test_other_encoders_and_language_models_work(make_tiny_model, tiny_processor, inputs, vision, text, tmp_path):
    model = make_tiny_model(vision=vision, text=text)
    logits = model(**inputs).logits
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**inputs).logits, logits)


def test_tied_embeddings_stay_tied_through_saving(make_tiny_model, tmp_path):
    model = make_tiny_model(tied=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_shards_come_back_whole(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in tiny_model.state_dict().items())


def test_loading_says_nothing_about_layers_that_are_not_needed(make_tiny_model, tmp_path, caplog):
    whole = make_tiny_model(vision_levels=[2, 6])
    whole.config.vision_levels, whole.config.vision_query_level = [2, 4], 4
    whole.save_pretrained(tmp_path)
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert len(again.model.vision_tower.encoder.layers) == 4


def test_a_projector_that_is_not_in_the_file_is_initialised(tiny_model, tmp_path):
    state = {key: value for key, value in tiny_model.state_dict().items() if "projector" not in key}
    tiny_model.save_pretrained(tmp_path, state_dict=state)
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert all("projector" in key for key in info["missing_keys"])
    weight = again.model.multi_modal_projector.key_mlp[0].weight
    expected = 0.02 * (1024 / tiny_model.config.vision_config.hidden_size) ** 0.5
    assert 0.8 * expected < weight.std() < 1.2 * expected
    assert (again.model.multi_modal_projector.key_mlp[0].bias == 0).all()


def test_loading_leaves_a_part_alone_that_initialises_itself_in_place(tiny_model, tiny_model_dir, monkeypatch):
    def init_weights(self):
        for parameter in self.parameters():
            parameter.data.zero_()

    monkeypatch.setattr(type(tiny_model.model.multi_modal_projector), "init_weights", init_weights)
    again = AutoModelForImageTextToText.from_pretrained(tiny_model_dir)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in tiny_model.state_dict().items())


def test_the_complete_model_takes_the_arguments_of_the_model_without_a_head_and_its_own(tiny_model, inputs):
    *base, others = inspect.signature(tiny_model.model.forward).parameters
    assert list(inspect.signature(tiny_model.forward).parameters) == [
        *base, "labels", "logits_to_keep", "only_learned", others
    ]  # fmt: skip
    by_place = [inputs[name] for name in ("input_ids", "pixel_values", "attention_mask")]
    assert torch.equal(tiny_model(*by_place).logits, tiny_model(**inputs).logits)


def test_a_model_is_made_from_pretrained_parts(make_tiny_model, inputs):
    from transformers import AutoModel, AutoModelForCausalLM

    config = make_tiny_model().config
    vision = AutoModel.from_config(config.vision_config)
    language = AutoModelForCausalLM.from_config(config.text_config)
    model = TokenPackerForConditionalGeneration.from_parts(
        vision, language, vision_levels=[2, 3, 4, 5], image_token_id=config.image_token_id,
        projector_config={"name": "token-packer", "num_heads": 4},
    )  # fmt: skip
    assert model.model.language_model is language.model
    assert model.lm_head is language.lm_head
    assert len(model.model.vision_tower.encoder.layers) == 5
    assert all(not parameter.is_meta for parameter in model.parameters())
    assert model(**inputs).logits.isfinite().all()


def test_device_map_places_the_parts(tiny_model_dir, inputs, tiny_model):
    placed = AutoModelForImageTextToText.from_pretrained(tiny_model_dir, device_map="auto")
    torch.testing.assert_close(placed(**inputs.to(placed.device)).logits.cpu(), tiny_model(**inputs).logits)


def test_images_find_their_places_among_embeddings(tiny_model, inputs):
    embeddings = tiny_model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        tiny_model(inputs_embeds=embeddings, input_ids=inputs["input_ids"])
    given = {name: value for name, value in inputs.items() if name != "input_ids"}
    assert torch.equal(tiny_model(inputs_embeds=embeddings, **given).logits, tiny_model(**inputs).logits)
    with pytest.raises(ValueError, match=r"hold \d+ image tokens but the images give 16 packed tokens"):
        tiny_model(inputs_embeds=embeddings, pixel_values=inputs["pixel_values"][:1])


def test_image_tokens_without_images_are_refused(tiny_model, inputs):
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="the prompt has image tokens but there are no images; pass pixel_values"):
        tiny_model.generate(**text)
    encoded = tiny_model.get_image_features(inputs["pixel_values"])
    for wrong in ({"images": encoded}, encoded, {"image": encoded.pooler_output}):
        with pytest.raises(ValueError, match=r"mm_encoder_outputs holds .*; pass {'image': ...} with the output of"):
            tiny_model(**text, mm_encoder_outputs=wrong)


def test_a_joined_models_parts_have_its_own_configs(tiny_model):
    vision, language = CLIPVisionModel(tiny_model.config.vision_config), LlamaForCausalLM(tiny_model.config.text_config)
    model = TokenPackerForConditionalGeneration.from_parts(
        vision, language, vision_levels=[2, 3], image_token_id=3, projector_config={"name": "mlp"}
    )
    assert model.model.vision_tower.config is model.config.vision_config
    assert model.model.language_model.config is model.config.text_config
    assert model.config.text_config is not tiny_model.config.text_config
    model.resize_token_embeddings(300)
    assert model.model.language_model.config.vocab_size == model.config.text_config.vocab_size == 300


@pytest.mark.parametrize("name", ["packed_tokens", "region_tokens"])
def test_the_old_names_of_encoded_images_are_not_ignored(tiny_model, inputs, name):
    with pytest.raises(ValueError, match=f"{name} is given as mm_encoder_outputs"):
        tiny_model(input_ids=inputs["input_ids"], **{name: torch.zeros(1, 16, 32)})


def test_without_return_dict_every_forward_gives_a_tuple(tiny_model, inputs):
    whole = tiny_model(**inputs, return_dict=False)
    assert isinstance(whole, tuple)
    assert torch.equal(whole[0], tiny_model(**inputs).logits)
    base = tiny_model.model(**inputs, return_dict=False)
    assert isinstance(base, tuple)
    assert torch.equal(base[0], tiny_model.model(**inputs).last_hidden_state)
    features = tiny_model.get_image_features(inputs["pixel_values"], return_dict=False)
    assert torch.equal(features[0], tiny_model.get_image_features(inputs["pixel_values"]).last_hidden_state)


def test_the_vision_towers_hidden_states_and_attentions_can_be_asked_for(make_tiny_model, inputs):
    model = make_tiny_model()
    model.set_attn_implementation("eager")
    features = model.get_image_features(inputs["pixel_values"], output_hidden_states=True, output_attentions=True)
    assert len(features.hidden_states) == model.config.num_vision_layers + 1
    assert len(features.attentions) == model.config.num_vision_layers
    assert torch.equal(features.hidden_states[5][:, 1:], features.last_hidden_state)
    plain = model.get_image_features(inputs["pixel_values"])
    assert plain.hidden_states is None
    assert torch.equal(plain.pooler_output, features.pooler_output)


def test_fewer_packed_tokens_than_places_are_refused_with_both_counts(tiny_model, inputs):
    places = int((inputs["input_ids"] == tiny_model.config.image_token_id).sum())
    inputs = {**inputs, "scale_factors": inputs["scale_factors"] * 2}
    with pytest.raises(ValueError, match=f"{places} image tokens but the images give {places // 4} packed tokens"):
        tiny_model(**inputs)


def test_tiles_of_another_size_are_refused(tiny_model):
    with pytest.raises(ValueError, match=r"the vision tower reads tiles \(N, 3, 32, 32\)"):
        tiny_model.get_image_features(torch.zeros(1, 3, 48, 48))


def test_adapters_from_peft_train_and_merge(make_tiny_model, inputs):
    from peft import LoraConfig, get_peft_model

    model = make_tiny_model()
    before = model(**inputs).logits
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)"))
    torch.testing.assert_close(adapted(**inputs).logits, before)
    adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.grad is not None]
    assert trained
    assert all("lora_" in name and "language_model" in name for name in trained)
    assert type(adapted.merge_and_unload()) is TokenPackerForConditionalGeneration


def test_gradient_checkpointing_gives_the_same_gradients(make_tiny_model, inputs):
    model = make_tiny_model().train()

    def gradients():
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    getattr(model, f"{RECOMPUTATION}_enable")({"use_reentrant": False})
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], msg=name)


def test_the_forward_compiles_into_one_graph(make_tiny_model, inputs):
    model = make_tiny_model()
    assert model._can_compile_fullgraph
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
        others = {**inputs, "scale_factors": inputs["scale_factors"] * 2}
        with pytest.raises(RuntimeError):  # the graph holds for the scale factor that it was made with
            compiled(**others)
        compiled = torch.compile(model.get_image_features, fullgraph=True, backend="eager")
        packed = compiled(inputs["pixel_values"], scale_factor=4).pooler_output
        torch.testing.assert_close(packed, model.get_image_features(inputs["pixel_values"], 4).pooler_output)
