"""Operations: the named formula and the modules' own count, each against numbers worked out by hand."""

import pytest
import transformers
from packaging.version import Version
from transformers import AutoConfig

from tokenpacker.hf import TokenPackerConfig
from tokenpacker.speed.flops import FlopTable, LanguageSizes, count_projector, count_vision, formula_excess
from tokenpacker.speed.model_sizes import candidates, named_shapes

GIGA, TERA = 10**9, 10**12
# Before 5.19 transformers makes the angles of rotary embeddings by a matrix product, which is counted.
ANGLES = 2e-4 if Version(transformers.__version__) < Version("5.19") else 1e-9


@pytest.fixture(scope="module")
def vicuna():
    return LanguageSizes.of(named_shapes("7b").config.text_config)


def projector_flops(name, scale_factor=None, size="7b"):
    shapes = named_shapes(size)
    return count_projector(shapes.config, candidates(shapes, [name], scale_factor)[0])


def test_the_formula_is_the_one_that_is_named(vicuna):
    n, d, m = 200, 4096, 11008
    assert vicuna.prefill(n) == 32 * (2 * n * (2 * d**2 + 2 * d * d + 3 * d * m) + 4 * n**2 * d)
    assert vicuna.head == 2 * d * 32000


def test_grouped_keys_make_two_of_the_four_projections_smaller(tiny_model):
    sizes = LanguageSizes.of(tiny_model.config.text_config)  # 2 layers, width 32, keys of 2 heads of 8, MLP of 64
    n, d, d_kv, m = 10, 32, 16, 64
    assert sizes.prefill(n) == 2 * (2 * n * (2 * d**2 + 2 * d * d_kv + 3 * d * m) + 4 * n**2 * d)


def test_further_tokens_see_all_before_them_and_go_through_the_head(vicuna):
    linears = 2 * (4 * 4096**2 + 3 * 4096 * 11008)
    second, third = (32 * (linears + 4 * context * 4096) for context in (201, 202))
    assert vicuna.decode(200, 3) == second + third + 2 * vicuna.head
    assert vicuna.decode(200, 1) == 0  # the first token comes of the prefill


def test_a_token_of_vicuna_7b_keeps_half_a_mebibyte_in_16_bits(vicuna):
    assert vicuna.cache_bytes(1, 2) == 2**19


@pytest.mark.parametrize("text", ["llama", "qwen2", "mistral"])
def test_the_formula_says_what_the_modules_multiply(make_tiny_model, text):
    assert formula_excess(make_tiny_model(text=text).config) == pytest.approx(0, abs=ANGLES)


def test_a_language_model_with_a_smaller_mlp_is_found_out(tiny_model):
    text = {"model_type": "gpt_neox", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "vocab_size": 300}
    config = TokenPackerConfig(tiny_model.config.vision_config, text, vision_levels=[2, 3, 4, 5], image_token_id=3)
    n, d, m = 64, 32, 64
    formula = 2 * n * (4 * d**2 + 3 * d * m) + 4 * n**2 * d
    real = 2 * n * (4 * d**2 + 2 * d * m) + 4 * n**2 * d  # its MLP has two matrices
    assert formula_excess(config) == pytest.approx(formula / real - 1, abs=ANGLES)


def test_a_language_model_without_such_sizes_is_refused():
    with pytest.raises(ValueError, match="the gpt2 config has no intermediate_size, which the formula"):
        LanguageSizes.of(AutoConfig.for_model("gpt2"))


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
    one, seven = table.of(packer, 1, 209), table.of(packer, 7, 1079)
    assert seven.vision == 7 * one.vision
    assert seven.projector == 7 * one.projector
    assert one.language == table.language.prefill(209)
    assert one.first_token == one.vision + one.projector + one.language + one.head
    assert one.vision / TERA == pytest.approx(2 * 0.183, abs=0.001)
