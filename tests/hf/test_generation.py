"""What `generate` and the pipeline give, and that a batch answers as each of its samples alone."""

import pytest
import torch
from peft import PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import TextIteratorStreamer, pipeline

from tokenpacker.hf.versions import PREFILLS_IMAGES_IN_CHUNKS


@pytest.fixture(scope="module")
def samples(image_of):
    return [
        ([image_of(64, 96)], "USER: <image>\nwhat? ASSISTANT:"),
        ([], "USER: hello there ASSISTANT:"),
        ([image_of(32, 32, 1), image_of(90, 40, 2)], "USER: <image>\n<image>\nsame? ASSISTANT:"),
    ]


def new_tokens(model, processor, samples, scale_factor=None, **kwargs):
    images, texts = zip(*samples, strict=True)
    inputs = processor(list(images), list(texts), scale_factor=scale_factor, return_tensors="pt")
    kwargs = {"do_sample": False} | kwargs
    return model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, **kwargs)[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@pytest.mark.parametrize(
    "options",
    [{"do_sample": False}, {"num_beams": 3, "do_sample": False}, {"do_sample": False, "use_cache": False}],
    ids=["greedy", "beams", "without cache"],
)
def test_a_left_padded_batch_answers_as_each_sample_alone(make_tiny_model, tiny_processor, samples, vision, options):
    model = make_tiny_model(vision=vision)
    together = new_tokens(model, tiny_processor, samples, **options)
    for answer, sample in zip(together, samples, strict=True):
        assert torch.equal(answer, new_tokens(model, tiny_processor, [sample], **options)[0])


def test_a_static_cache_gives_the_same_tokens(tiny_model, tiny_processor, samples):
    plain = new_tokens(tiny_model, tiny_processor, samples, do_sample=False)
    static = new_tokens(
        tiny_model, tiny_processor, samples, do_sample=False, cache_implementation="static", disable_compile=True
    )
    assert torch.equal(static, plain)


def test_sampling_depends_on_the_seed(tiny_model, tiny_processor, samples):
    torch.manual_seed(1)
    first = new_tokens(tiny_model, tiny_processor, samples, do_sample=True)
    torch.manual_seed(1)
    assert torch.equal(new_tokens(tiny_model, tiny_processor, samples, do_sample=True), first)
    assert not torch.equal(new_tokens(tiny_model, tiny_processor, samples, do_sample=True), first)


def test_several_answers_per_sample_keep_their_images(tiny_model, tiny_processor, samples):
    greedy = new_tokens(tiny_model, tiny_processor, samples, do_sample=False)
    several = new_tokens(tiny_model, tiny_processor, samples, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(several, greedy.repeat_interleave(2, dim=0))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=["greedy", "beams", "no cache"])
@pytest.mark.parametrize("scale_factor", [1, 4, [[1, 4, 2, 1, 3, 4, 2], 4, [8, 2, 4, 1, 8, 8, 3, 3, 1]]], ids=str)
def test_the_scale_factor_is_said_once(make_tiny_model, tiny_processor, samples, scale_factor, options):
    model = make_tiny_model()
    together = new_tokens(model, tiny_processor, samples, scale_factor=scale_factor, **options)
    for number, (images, text) in enumerate(samples):
        own = scale_factor
        if isinstance(scale_factor, list):
            own = [scale_factor[:1], [], scale_factor[1:]][number]
        alone = new_tokens(model, tiny_processor, [(images, text)], scale_factor=own, **options)
        assert torch.equal(together[number], alone[0])


def test_tokens_of_mixed_scale_factors_stand_in_their_places(tiny_model, tiny_processor, samples):
    images, text = samples[0]
    factors = [1, 4, 2, 1, 3, 4, 2]
    inputs = tiny_processor(images, text, scale_factor=[factors], return_tensors="pt")
    assert inputs["scale_factors"].tolist() == factors
    embeddings = tiny_model.get_input_embeddings()(inputs["input_ids"])
    alone = [  # slowly: tile by tile
        tiny_model.get_image_features(tile[None], factor).pooler_output[0]
        for tile, factor in zip(inputs["pixel_values"], factors, strict=True)
    ]
    embeddings[inputs["input_ids"] == tiny_processor.image_token_id] = torch.cat(alone)
    expected = tiny_model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).logits
    torch.testing.assert_close(tiny_model(**inputs).logits, expected)


def test_another_scale_factor_than_that_of_the_inputs_is_refused(tiny_model, tiny_processor, samples):
    inputs = tiny_processor(*samples[0], scale_factor=4, return_tensors="pt")
    assert tiny_model.generate(**inputs, scale_factor=4, max_new_tokens=1).shape[0] == 1
    with pytest.raises(ValueError, match=r"scale_factor=2 was given with inputs .* for scale factors \[4\]; leave"):
        tiny_model.generate(**inputs, scale_factor=2, max_new_tokens=1)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beams", "no cache"])
def test_embeddings_instead_of_ids_give_the_same_answers(tiny_model, tiny_processor, samples, options):
    images, text = samples[0]
    inputs = tiny_processor(images, text, return_tensors="pt")
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False} | options
    expected = tiny_model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    embeddings = tiny_model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(tiny_model.generate(inputs_embeds=embeddings, **inputs, **options), expected)


@pytest.mark.parametrize("config", [PromptTuningConfig, PromptEncoderConfig], ids=["prompt tuning", "p-tuning"])
def test_virtual_tokens_of_peft_stand_before_images(make_tiny_model, tiny_processor, samples, config):
    model = get_peft_model(make_tiny_model(), config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    images, text = samples[0]
    inputs = tiny_processor(images, text, return_tensors="pt")
    output = model(**inputs, labels=inputs["input_ids"])
    output.loss.backward()
    learned = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert learned
    assert all("prompt_encoder" in name for name in learned)
    answer = model.eval().generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    first = output.logits[0, -1].argmax()
    assert answer[0, inputs["input_ids"].shape[1]] == first


def test_a_prefill_in_chunks_keeps_the_images_or_is_refused(tiny_model, tiny_processor, samples):
    inputs = tiny_processor(*samples[0], return_tensors="pt")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    if not PREFILLS_IMAGES_IN_CHUNKS:
        with pytest.raises(ValueError, match="prefill_chunk_size loses images"):
            tiny_model.generate(**inputs, **options, prefill_chunk_size=16)
        return
    chunked = tiny_model.generate(**inputs, **options, prefill_chunk_size=16)
    assert torch.equal(chunked, tiny_model.generate(**inputs, **options))


def test_a_prefill_in_chunks_with_regions_is_refused(region_model, image_of):
    model, processor = region_model
    inputs = processor(image_of(64, 96), "<image><mask>?", region_masks=[[(0, 0, 40, 30)]], return_tensors="pt")
    with pytest.raises(ValueError, match="prefill_chunk_size loses regions"):
        model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=16)


def test_images_are_encoded_once_per_answer(tiny_model, tiny_processor, samples, monkeypatch):
    calls = []
    tower = tiny_model.model.vision_tower
    hook = tower.register_forward_hook(lambda *_: calls.append(1))
    new_tokens(tiny_model, tiny_processor, samples[:1], num_beams=3)
    hook.remove()
    assert len(calls) == 1


def test_the_streamer_gives_the_text_piece_by_piece(tiny_model, tiny_processor, samples):
    images, text = samples[0]
    inputs = tiny_processor(images, text, return_tensors="pt")
    streamer = TextIteratorStreamer(tiny_processor.tokenizer, skip_prompt=True)
    tokens = tiny_model.generate(**inputs, max_new_tokens=5, streamer=streamer, do_sample=False)
    assert "".join(streamer) == tiny_processor.decode(tokens[0, inputs["input_ids"].shape[1] :])


def test_the_pipeline_answers_a_conversation(tiny_model_dir, image_of):
    ask = pipeline("image-text-to-text", model=str(tiny_model_dir))
    content = [{"type": "image", "image": image_of(40, 40)}, {"type": "text", "text": "what?"}]
    answer = ask(text=[{"role": "user", "content": content}], generate_kwargs={"max_new_tokens": 4})
    assert answer[0]["generated_text"][-1]["role"] == "assistant"
