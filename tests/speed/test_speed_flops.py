"""Operations: the named formula and the modules' own count, each against numbers worked out by hand."""

import pytest
import transformers
from packaging.version import Version
from transformers import AutoConfig

from tokenpacker.speed.flops import FlopTable, LanguageCost, count_projector, count_vision
from tokenpacker.speed.model_sizes import candidates, named_shapes

GIGA, TERA = 10**9, 10**12
# Before 5.19 transformers makes the angles of rotary embeddings by a matrix product, which is counted.
ANGLES = 2e-4 if Version(transformers.__version__) < Version("5.19") else 1e-9


@pytest.fixture(scope="module")
def vicuna():
    return LanguageCost.of(named_shapes("7b").config.text_config)


def projector_flops(name, scale_factor=None, size="7b"):
    shapes = named_shapes(size)
    one = candidates(shapes, [name], scale_factor)[0]
    return count_projector(one.config, shapes.config.patch_grid, one.scale_factor)


def test_layers_of_llama_come_to_the_formula_that_is_named(vicuna):
    n, d, m = 200, 4096, 11008
    formula = 32 * (2 * n * (2 * d**2 + 2 * d * d + 3 * d * m) + 4 * n**2 * d)
    assert vicuna.prefill(n) == pytest.approx(formula, rel=ANGLES)
    assert vicuna.head == 2 * d * 32000


@pytest.mark.parametrize("text", ["llama", "qwen2", "mistral"])
def test_grouped_keys_make_two_of_the_four_projections_smaller(make_tiny_model, text):
    cost = LanguageCost.of(make_tiny_model(text=text).config.text_config)
    n, d, d_kv, m = 10, 32, 16, 64  # 2 layers, width 32, keys of 2 heads of 8, MLP of 64
    formula = 2 * (2 * n * (2 * d**2 + 2 * d * d_kv + 3 * d * m) + 4 * n**2 * d)
    assert cost.prefill(n) == pytest.approx(formula, rel=ANGLES)
    assert cost.cache == 2 * 2 * d_kv


def test_further_tokens_see_all_before_them_and_go_through_the_head(vicuna):
    linears = 2 * (4 * 4096**2 + 3 * 4096 * 11008)
    second, third = (32 * (linears + 4 * context * 4096) for context in (201, 202))
    assert vicuna.decode(200, 3) == pytest.approx(second + third + 2 * vicuna.head, rel=ANGLES)
    assert vicuna.decode(200, 1) == 0  # the first token comes of the prefill


def test_a_token_of_vicuna_7b_keeps_half_a_mebibyte_in_16_bits(vicuna):
    assert vicuna.cache_bytes(1, 2) == 2**19


def test_an_mlp_of_two_matrices_is_counted_as_such():
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    cost = LanguageCost.of(AutoConfig.for_model("gpt_neox", **text, vocab_size=300))
    n, d, m = 64, 32, 64
    assert cost.prefill(n) == pytest.approx(2 * (2 * n * (4 * d**2 + 2 * d * m) + 4 * n**2 * d), rel=ANGLES)


def test_a_token_costs_the_experts_that_it_goes_to():
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 4, "vocab_size": 300, "num_local_experts": 4, "num_experts_per_tok": 2}
    cost = LanguageCost.of(AutoConfig.for_model("mixtral", **text))
    n, d, m, experts = 64, 32, 64, 4
    layer = 2 * n * (4 * d**2 + experts * d + 2 * 3 * d * m) + 4 * n**2 * d
    assert cost.prefill(n) == pytest.approx(2 * layer, rel=ANGLES)


def test_a_language_model_that_cannot_be_counted_is_refused():
    config = AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=1, vocab_size=300)
    with pytest.raises(ValueError, match="operations of a mamba model cannot be counted without weights"):
        LanguageCost.of(config)


def test_the_vision_tower_is_counted_up_to_the_last_level_that_is_used(tiny_model):
    patches, tokens, d, m = 64, 65, 32, 64  # 32-pixel tiles of 4-pixel patches, and CLS; 5 of 6 layers
    embedding = 2 * patches * d * 3 * 4 * 4
    layer = 2 * tokens * (4 * d**2 + 2 * d * m) + 4 * tokens**2 * d
    assert count_vision(tiny_model.config) == embedding + 5 * layer


def test_projectors_are_counted_from_their_modules():
    c, d = 1024, 4096
    assert projector_flops("mlp") == 2 * 576 * (c * d + d * d)
    assert projector_flops("average-pool", 2) == 2 * 144 * (c * d + d * d)
    assert projector_flops("average-pool", 3) == 2 * 64 * (c * d + d * d)


@pytest.mark.parametrize(("scale_factor", "multiplications"), [(2, 10.7), (3, 8.8), (4, 8.1)])
def test_token_packer_costs_what_was_worked_out_for_it(scale_factor, multiplications):
    assert projector_flops("token-packer", scale_factor) / 2 / GIGA == pytest.approx(multiplications, abs=0.05)


def test_an_image_costs_its_tiles_and_its_prompt():
    shapes = named_shapes("7b")
    table, (packer, *_) = FlopTable(shapes.config), candidates(shapes, ["token-packer"], 2)
    one, seven = (
        table.of(packer.config, packer.scale_factor, num_tiles=tiles, num_prompt=prompt)
        for tiles, prompt in ((1, 209), (7, 1079))
    )
    assert seven["vision"] == 7 * one["vision"]
    assert seven["projector"] == 7 * one["projector"]
    assert one["language"] == table.language.prefill(209)
    assert one["first_token"] == one["vision"] + one["projector"] + one["language"] + one["head"]
    assert one["vision"] / TERA == pytest.approx(2 * 0.183, abs=0.001)


def test_counting_leaves_the_config_as_it_is():
    shapes = named_shapes("small")
    before = shapes.config.text_config._attn_implementation, shapes.config.vision_config._attn_implementation
    assert shapes.table.language.linear > 0
    assert shapes.table.vision > 0
    after = shapes.config.text_config._attn_implementation, shapes.config.vision_config._attn_implementation
    assert before == after
