import pytest
import torch

from tokenpacker.data.collate import collate_packed, collate_padded, packing_problem
from tokenpacker.data.samples import Sample
from tokenpacker.sequence import IGNORED

PAD = 0


def make_sample(id, *ids, tiles=(), learn_first=False, masked=()):
    """A sample with token ids, of which all but the first are learned, and one-colour tiles of 2 x 2 pixels."""
    labels = torch.tensor(ids)
    if not learn_first:
        labels[0] = IGNORED
    mask = torch.ones(len(ids), dtype=torch.int64)
    mask[list(masked)] = 0
    pixels = torch.cat([torch.full((1, 3, 2, 2), float(tile)) for tile in tiles] or [torch.zeros(0, 3, 2, 2)])
    return Sample(
        id=id, input_ids=torch.tensor(ids), labels=labels, attention_mask=mask, pixel_values=pixels, tile_grids=()
    )


LONG, SHORT, OTHER = make_sample("long", 5, 6, 7, tiles=[1, 2]), make_sample("short", 8, 9), make_sample("other", 4)


def test_padded_samples_have_a_row_each():
    batch = collate_padded([LONG, SHORT], PAD)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, PAD]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, 9, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_a_token_that_is_masked_in_a_sample_is_masked_in_the_padded_batch():
    batch = collate_padded([LONG, make_sample("unknown", 3, PAD, 3, masked=[1])], PAD)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 1]]


def test_packed_samples_share_rows_and_padding_is_a_segment_of_its_own():
    batch = collate_packed([[LONG, SHORT], [OTHER, SHORT]], PAD)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [4, 8, 9, PAD, PAD]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, IGNORED, 9], [IGNORED, IGNORED, 9, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 0, 1, 0, 1]]
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert batch[name].tolist() == [0, 3, 5, 6, 8, 10]
        assert batch[name].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == 3


def test_equal_tiles_are_kept_once_and_come_back_in_order():
    samples = [make_sample("a", 1, tiles=[1, 2]), OTHER, make_sample("b", 1, tiles=[3, 1, 2])]
    for batch in (collate_padded(samples, PAD), collate_packed([samples[:1], samples[1:]], PAD)):
        assert batch["pixel_values"][:, 0, 0, 0].tolist() == [1, 2, 3]
        assert batch["tile_index"].tolist() == [0, 1, 2, 0, 1]
        expected = torch.cat([sample.pixel_values for sample in samples])
        assert torch.equal(batch["pixel_values"][batch["tile_index"]], expected)


def test_tiles_that_differ_in_one_bit_are_two():
    almost = make_sample("almost", 1, tiles=[1])
    almost.pixel_values[0, 2, 1, 1] = 1 + torch.finfo(torch.float32).eps
    assert len(collate_padded([LONG, almost], PAD)["pixel_values"]) == 3


def test_half_precision_tiles_work():
    half = make_sample("half", 1, tiles=[1, 1])
    half = Sample(**{**vars(half), "pixel_values": half.pixel_values.bfloat16()})
    assert collate_padded([half], PAD)["pixel_values"].shape == (1, 3, 2, 2)


def test_text_alone_gives_no_tiles_of_the_right_size():
    batch = collate_packed([[SHORT, OTHER]], PAD)
    assert batch["pixel_values"].shape == (0, 3, 2, 2)
    assert batch["tile_index"].tolist() == []
    assert batch["tile_index"].dtype == torch.int64


def test_a_sample_whose_first_token_is_learned_cannot_be_packed():
    eager = make_sample("eager", 5, 6, learn_first=True)
    assert packing_problem(SHORT) is None
    with pytest.raises(ValueError, match=r"sample eager cannot be packed: labels\[0\]=5 .* set it to -100"):
        collate_packed([[SHORT, eager]], PAD)


def test_a_sample_with_a_masked_token_in_its_midst_cannot_be_packed():
    masked = make_sample("masked", 3, PAD, 3, masked=[1])
    with pytest.raises(ValueError, match="sample masked cannot be packed: attention_mask is 0 at token 1"):
        collate_packed([[masked]], PAD)


def test_a_batch_without_samples_is_refused():
    for collate, nothing in ((collate_padded, []), (collate_packed, [[]])):
        with pytest.raises(ValueError, match="a batch needs at least one sample"):
            collate(nothing, PAD)
