"""Packed rows, shared tiles and the frozen tower: what saves time must change no result."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from tokenpacker.data.collate import collate_packed, collate_padded
from tokenpacker.data.samples import Sample
from tokenpacker.hf.versions import RECOMPUTATION
from tokenpacker.sequence import IGNORED

# Float32 sums over rows of another width come in another order; a token seen or missed would show in the first digits.
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def make_sample(tiny_processor, image_of):
    """Makes a sample of a text and the sizes of its images; the second half of its text is learned."""

    def make(text: str, *sizes: tuple[int, int], seed: int = 0) -> Sample:
        images = [image_of(*size, seed + number) for number, size in enumerate(sizes)]
        inputs = tiny_processor([images], ["<image>" * len(images) + text], return_tensors="pt")
        ids = inputs["input_ids"][0]
        labels = ids.masked_fill(torch.arange(len(ids)) < len(ids) - len(text) // 2, IGNORED)
        tiles = inputs.get("pixel_values", torch.zeros(0, 3, 32, 32))
        return Sample(
            id=text,
            input_ids=ids,
            labels=labels,
            attention_mask=torch.ones_like(ids),
            pixel_values=tiles,
            tile_grids=(),
        )

    return make


@pytest.fixture(scope="module")
def rows(make_sample):
    """Mixed grids, several images, text alone; one row is full, one ends in padding."""
    return [
        [make_sample("one tile", (32, 32)), make_sample("text alone"), make_sample("six tiles", (64, 96), seed=1)],
        [make_sample("two images", (90, 40), (32, 32), seed=2), make_sample("no image at all here")],
    ]


def alone(model, sample, **kwargs):
    """The model's output for one sample by itself."""
    return model(
        input_ids=sample.input_ids[None], pixel_values=sample.pixel_values, labels=sample.labels[None], **kwargs
    )


def unpacked_logits(model, rows):
    """Per row the logits of its samples, each computed by itself."""
    return [torch.cat([alone(model, sample).logits[0] for sample in row]) for row in rows]


TEXT_MODELS = ["llama", "qwen2", "smollm3", "mistral"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("text", TEXT_MODELS)
def test_a_packed_sample_gets_the_logits_it_gets_alone(make_tiny_model, rows, text, attention):
    model = make_tiny_model(text=text)
    if text == "mistral":
        model.model.language_model.config.sliding_window = 24  # shorter than the longest sample
    model.model.language_model.set_attn_implementation(attention)
    packed = model(**collate_packed(rows, pad_token_id=0)).logits
    for row, expected in zip(packed, unpacked_logits(model, rows), strict=True):
        torch.testing.assert_close(row[: len(expected)], expected, **ROUNDING)


def test_flash_attention_gets_the_bounds_of_every_sample(make_tiny_model, rows):
    """Stands in for the kernels, which need a GPU: attends within the given bounds, over all rows laid end to end."""

    def within_bounds(module, query, key, value, attention_mask, scaling, cu_seq_lens_q, max_length_q, **kwargs):
        assert attention_mask is None
        assert int(cu_seq_lens_q.diff().max()) == max_length_q
        batch, heads = query.shape[:2]
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        q, k, v = (x.transpose(0, 1).flatten(1, 2) for x in (query, key, value))  # (heads, B*S, dim)
        spans = [slice(start, end) for start, end in cu_seq_lens_q.unfold(0, 2, 1).tolist()]
        out = torch.cat(
            [F.scaled_dot_product_attention(q[:, s], k[:, s], v[:, s], is_causal=True, scale=scaling) for s in spans], 1
        )
        return out.view(heads, batch, -1, out.shape[-1]).permute(1, 2, 0, 3), None

    AttentionInterface.register("within_bounds", within_bounds)
    AttentionMaskInterface.register("within_bounds", flash_attention_mask)
    model = make_tiny_model()
    expected = unpacked_logits(model, rows)
    model.model.language_model.set_attn_implementation("within_bounds")
    packed = model(**collate_packed(rows, pad_token_id=0)).logits
    for row, logits in zip(packed, expected, strict=True):
        torch.testing.assert_close(row[: len(logits)], logits, **ROUNDING)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_loss_and_gradients_are_those_of_the_samples_weighted_by_their_tokens(
    make_tiny_model, rows, checkpointing
):
    model = make_tiny_model().train()
    samples = [sample for row in rows for sample in row]
    learned = [int((sample.labels != IGNORED).sum()) for sample in samples]
    losses = [alone(model, sample).loss * count for sample, count in zip(samples, learned, strict=True)]
    expected = torch.stack(losses).sum() / sum(learned)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    if checkpointing:
        getattr(model, f"{RECOMPUTATION}_enable")({"use_reentrant": False})
    loss = model(**collate_packed(rows, pad_token_id=0)).loss
    assert abs(loss - expected) < 1e-5
    loss.backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_packed_rows_and_padded_rows_have_the_same_loss(make_tiny_model, rows):
    model = make_tiny_model()
    padded = model(**collate_padded([sample for row in rows for sample in row], pad_token_id=0)).loss
    assert abs(model(**collate_packed(rows, pad_token_id=0)).loss - padded) < 1e-5


def test_each_image_tokens_loss_reaches_its_own_images_pixels_and_no_other(make_tiny_model, make_sample):
    """What enters the language model is followed back to the pixels, at every fifth image token to save time."""
    model = make_tiny_model()
    rows = [
        [make_sample("a", (32, 32)), make_sample("b"), make_sample("c", (64, 96), (32, 32), seed=1)],
        [make_sample("d", (40, 90), seed=3), make_sample("e")],
    ]
    batch = collate_packed(rows, pad_token_id=0)
    pixels = batch["pixel_values"].requires_grad_()
    entered = {}
    handle = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda _, args: entered.update(states=args[0])
    )
    model(**batch)
    handle.remove()
    places = (batch["input_ids"] == model.config.image_token_id).nonzero().tolist()
    assert len(places) == 16 * len(batch["tile_index"])
    for number, (row, column) in enumerate(places[::5]):
        (gradient,) = torch.autograd.grad(entered["states"][row, column].sum(), pixels, retain_graph=True)
        reached = gradient.flatten(1).abs().sum(1).nonzero().flatten().tolist()
        assert reached == [batch["tile_index"][5 * number // 16]]


def test_a_samples_loss_reaches_the_pixels_of_its_own_images_and_no_other(make_tiny_model, make_sample):
    model = make_tiny_model()
    texts = {"first": [(32, 32)], "words": [], "second": [(64, 96), (32, 32)], "third": [(40, 90)]}
    samples = [make_sample(text, *sizes, seed=10 * n) for n, (text, sizes) in enumerate(texts.items())]
    batch = collate_packed([samples[:3], samples[3:]], pad_token_id=0)
    pixels = batch["pixel_values"].requires_grad_()
    logits = model(**batch).logits
    row, start, first_tile = 0, 0, 0
    for sample in samples:
        if sample is samples[3]:
            row, start = 1, 0
        end, last_tile = start + len(sample.input_ids), first_tile + len(sample.pixel_values)
        loss = F.cross_entropy(logits[row, start : end - 1], sample.labels[1:])
        (gradient,) = torch.autograd.grad(loss, pixels, retain_graph=True, materialize_grads=True)
        reached = gradient.flatten(1).abs().sum(1).nonzero().flatten().tolist()
        assert reached == list(range(first_tile, last_tile))
        start, first_tile = end, last_tile


@pytest.mark.parametrize("packed", [False, True])
def test_logits_at_learned_places_alone_teach_the_same(make_tiny_model, rows, packed):
    collate = collate_packed(rows, 0) if packed else collate_padded([sample for row in rows for sample in row], 0)
    num_learned = int((collate["labels"][:, 1:] != IGNORED).sum())
    gradients = []
    for only_learned in (False, True):
        model = make_tiny_model()
        outputs = model(**collate, only_learned=only_learned, num_items_in_batch=torch.tensor(num_learned))
        outputs.loss.backward()
        gradients.append([outputs.loss.detach(), *(parameter.grad for parameter in model.parameters())])
    assert outputs.logits.shape == (num_learned, model.config.text_config.vocab_size)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # the same sums in another order


def test_learned_places_need_labels(tiny_model):
    with pytest.raises(ValueError, match="only_learned=True needs labels"):
        tiny_model(input_ids=torch.tensor([[1, 2]]), only_learned=True)


def test_what_stands_in_the_padding_changes_nothing(tiny_model, rows):
    batch = collate_packed(rows, pad_token_id=0)
    padding = batch["attention_mask"] == 0
    assert padding.any()
    other = batch | {"input_ids": batch["input_ids"].masked_fill(padding, 9)}
    assert torch.equal(tiny_model(**other).loss, tiny_model(**batch).loss)
    assert torch.equal(tiny_model(**other).logits[~padding], tiny_model(**batch).logits[~padding])


def test_packed_rows_without_positions_or_with_a_cache_are_refused(tiny_model, rows):
    batch = collate_packed(rows, pad_token_id=0)
    with pytest.raises(ValueError, match=r"position_ids=None for packed rows"):
        tiny_model(**batch | {"position_ids": None})
    with pytest.raises(ValueError, match=r"use_cache=True for packed rows; leave them out"):
        tiny_model(**batch, use_cache=True)


def tiles_encoded(model, run):
    """How many tiles pass the tower in each of its calls during `run()`."""
    calls = []
    handle = model.model.vision_tower.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    run()
    handle.remove()
    return calls


def test_a_tile_that_occurs_twice_is_encoded_once_and_learns_from_both(make_tiny_model, make_sample):
    model = make_tiny_model()
    samples = [
        make_sample("same picture", (64, 64)),
        make_sample("and again", (64, 64)),
        make_sample("b", (32, 32), seed=5),
    ]
    batch = collate_packed([samples], pad_token_id=0)
    repeated = batch | {"pixel_values": torch.cat([sample.pixel_values for sample in samples]), "tile_index": None}
    gradients = []
    for inputs in (batch, repeated):
        model.zero_grad()
        calls = tiles_encoded(model, lambda inputs=inputs: model(**inputs).loss.backward())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        assert sum(calls) == len(inputs["pixel_values"])
    assert len(repeated["pixel_values"]) == len(batch["pixel_values"]) + len(samples[0].pixel_values)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_answers_do_not_change_when_tiles_are_shared(tiny_model, make_sample):
    sample = make_sample("?", (32, 32), (32, 32))
    twice = sample.pixel_values[[0, 0]]
    for beams in (1, 2):
        settings = {"max_new_tokens": 4, "num_beams": beams, "do_sample": False}
        shared = {"pixel_values": twice[:1], "tile_index": torch.tensor([0, 0])}
        answer = tiny_model.generate(sample.input_ids[None], **shared, **settings)
        assert torch.equal(answer, tiny_model.generate(sample.input_ids[None], pixel_values=twice, **settings))


def test_an_order_of_tiles_without_tiles_is_refused(tiny_model, make_sample):
    with pytest.raises(ValueError, match="tile_index was given without pixel_values"):
        tiny_model(make_sample("text").input_ids[None], tile_index=torch.tensor([0]))


def test_a_frozen_tower_runs_in_chunks_without_keeping_anything(make_tiny_model):
    model = make_tiny_model()
    pixels = torch.randn(7, 3, 32, 32)
    whole = model.model.vision_features(pixels)
    assert whole.levels.requires_grad
    model.model.vision_tower.requires_grad_(False)
    model.model.vision_chunk_tiles = 3
    assert tiles_encoded(model, lambda: model.model.vision_features(pixels)) == [3, 3, 1]
    features = model.model.vision_features(pixels)
    assert not features.levels.requires_grad
    torch.testing.assert_close(features.levels, whole.levels, **ROUNDING)
    torch.testing.assert_close(features.query, whole.query, **ROUNDING)


def test_a_frozen_tower_still_passes_gradients_on_to_pixels_that_want_them(make_tiny_model):
    model = make_tiny_model()
    model.model.vision_tower.requires_grad_(False)
    pixels = torch.randn(2, 3, 32, 32, requires_grad=True)
    model.get_image_features(pixels).pooler_output[1].sum().backward()
    assert (pixels.grad[0] == 0).all()
    assert (pixels.grad[1] != 0).any()


def test_a_batch_of_text_gives_the_projector_a_gradient_of_zero(make_tiny_model, make_sample):
    """So that it takes part on each of several processes, of which some have images and some do not."""
    model = make_tiny_model()
    model.model.vision_tower.requires_grad_(False)
    batch = collate_packed([[make_sample("only"), make_sample("words")]], pad_token_id=0)
    output = model(**batch)
    output.loss.backward()
    assert all((parameter.grad == 0).all() for parameter in model.model.multi_modal_projector.parameters())
    without = {key: value for key, value in batch.items() if key not in ("pixel_values", "tile_index")}
    assert torch.equal(output.logits, model(**without).logits)
