"""TokenPacker without gradients: the plain path's function, from folded weights that never outlive their parameters."""

import copy
import pickle

import numpy as np
import pytest
import torch

from golden_weights import golden_features, golden_packer
from tokenpacker import TokenPacker, TokenPackerProjectorConfig, VisionFeatures
from tokenpacker.projectors import folded as token_packer_fast
from tokenpacker.projectors.folded import fold
from tokenpacker.projectors.token_packer import WindowAttention


def random_features(grid=(6, 6), num_tiles=2, dtype=torch.float32):
    length = grid[0] * grid[1]
    return VisionFeatures(
        torch.randn(num_tiles, length, 16, dtype=dtype), torch.randn(num_tiles, length, 48, dtype=dtype), grid
    )


@pytest.fixture(autouse=True)
def narrow_projectors_are_folded_too(monkeypatch):
    monkeypatch.setattr(token_packer_fast, "MIN_VISION_DIM", 1)
    monkeypatch.setattr(TokenPacker, "folds_weights", True)


@pytest.fixture
def packer():
    packer = TokenPacker(TokenPackerProjectorConfig(vision_dim=16, language_dim=24, num_levels=3, num_heads=4))
    for parameter in packer.parameters():  # biases and norms too, so that a forgotten one shows
        torch.nn.init.normal_(parameter, std=0.3)
    return packer


def plain(packer, features, scale=None):
    """With gradients, so on the plain path."""
    packed = packer(features, scale)
    assert packed.requires_grad
    return packed.detach()


def fast(packer, features, scale=None):
    with torch.no_grad():
        packed = packer(features, scale)
    assert is_folded(packer)
    return packed


def is_folded(packer):
    return packer._fast_path._folded is not None


GRIDS_AND_SCALES = [((6, 6), 2), ((6, 9), 3), ((8, 4), 4), ((5, 7), 2), ((7, 5), 3), ((4, 6), 1), ((5, 5), 5)]


@pytest.mark.parametrize(("grid", "scale"), GRIDS_AND_SCALES)
def test_it_is_the_same_function_up_to_rounding(packer, grid, scale):
    features = random_features(grid)
    torch.testing.assert_close(fast(packer, features, scale), plain(packer, features, scale), atol=1e-5, rtol=1e-5)
    packer, features = packer.double(), random_features(grid, dtype=torch.float64)
    # in float64 rounding is 1e-16: that nothing more remains shows that the algebra is exact
    torch.testing.assert_close(fast(packer, features, scale), plain(packer, features, scale), atol=1e-12, rtol=1e-12)


def test_large_calls_take_it_unasked_and_small_ones_do_not(packer, monkeypatch):
    monkeypatch.setattr(TokenPacker, "folds_weights", None)
    with torch.no_grad():
        packer(random_features((24, 24), num_tiles=3))
        assert not is_folded(packer)
        packer(random_features((24, 24), num_tiles=4))
    assert is_folded(packer)


def test_it_can_be_refused(packer):
    packer.folds_weights = False
    with torch.no_grad():
        packer(random_features((24, 24), num_tiles=4))
    assert not is_folded(packer)


@pytest.mark.parametrize("num_tiles", [0, 1, 5])
def test_computed_in_parts_it_gives_the_same(packer, monkeypatch, num_tiles):
    features = random_features((5, 7), num_tiles)
    whole = fast(packer, features)
    monkeypatch.setattr(token_packer_fast, "PATCHES_AT_A_TIME", 70)  # two tiles
    monkeypatch.setattr(token_packer_fast, "TOKENS_AT_A_TIME", 7)
    monkeypatch.setattr(token_packer_fast, "BLOCK", 5)
    torch.testing.assert_close(fast(packer, features), whole, atol=1e-5, rtol=1e-5)


def test_a_width_of_several_blocks_is_folded_too():
    packer = TokenPacker(TokenPackerProjectorConfig(vision_dim=320, language_dim=48, num_levels=1, num_heads=4))
    features = VisionFeatures(torch.randn(1, 36, 320), torch.randn(1, 36, 320), (6, 6))
    torch.testing.assert_close(fast(packer, features), plain(packer, features), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["s2_h64", "s3_h64", "s4_h64"])
def test_outputs_equal_those_of_the_original_code(golden, case):
    stored = torch.from_numpy(np.load(golden / "projector" / f"{case}.npz")["out"])
    out = fast(golden_packer(case), golden_features(case))
    # values reach 4; 5e-6 measured, two orders of summation in float32
    assert (out - stored).abs().max() < 1e-5


@pytest.mark.slow
def test_at_full_width_it_is_as_near_to_the_truth_as_the_plain_path(golden):
    case = "s2_h4096"
    packer, features = golden_packer(case), golden_features(case)
    rounded = [run(packer, features) for run in (plain, fast)]
    doubles = VisionFeatures(features.query.double(), features.levels.double(), features.patch_grid)
    truth = plain(packer.double(), doubles)
    errors = [(out - truth).square().mean().sqrt() for out in rounded]
    assert errors[1] < 1.1 * errors[0]  # 6.1e-6 both
    # Values reach 44. The original's stored numbers lie up to 2.5e-5 from the truth, so nothing that adds in another
    # order can promise their 2e-5; ours lie up to 3.5e-5 from them, and up to 4.4e-5 from the plain path.
    stored = torch.from_numpy(np.load(golden / "projector" / f"{case}.npz")["out_slice"])
    assert (rounded[1][:, ::8, :64] - stored).abs().max() < 5e-5
    assert (rounded[1] - rounded[0]).abs().max() < 1e-5 * rounded[0].abs().max()  # 1e-6 measured


def test_gradients_take_the_plain_path_and_leave_nothing_folded(packer):
    features = random_features()
    fast(packer, features)
    packer(features).sum().backward()
    assert not is_folded(packer)
    assert all(parameter.grad is not None for parameter in packer.parameters())


def test_a_call_that_learns_leaves_nothing_folded_even_when_small(packer, monkeypatch):
    fast(packer, random_features())
    monkeypatch.setattr(TokenPacker, "folds_weights", None)
    packer(random_features())
    assert not is_folded(packer)


def test_gradients_of_the_features_alone_take_the_plain_path(packer):
    features = random_features()
    features.levels.requires_grad_()
    packer.requires_grad_(False)(features).sum().backward()
    assert features.levels.grad.abs().max() > 0


def test_a_frozen_projector_is_folded_while_others_learn(packer):
    packer.requires_grad_(False)(random_features())
    assert is_folded(packer)


def write_in_place(packer):
    with torch.no_grad():
        packer.attention.query_proj.weight.mul_(2)


def write_through_data(packer):
    packer.value_norm.weight.data.mul_(2)


def write_a_row_through_data(packer):
    packer.key_mlp[2].weight.data[7] *= 50


def write_a_column_through_data(packer):
    packer.output_mlp[2].weight.data[:, 3] *= 50


def exchange_data(packer):
    packer.output_mlp[0].bias.data = torch.randn(24)


def exchange_a_parameter(packer):
    packer.key_mlp[2].weight = torch.nn.Parameter(torch.randn(16, 16))


def load_other_weights(packer):
    packer.load_state_dict({name: torch.randn_like(tensor) for name, tensor in packer.state_dict().items()})


def assign_other_weights(packer):
    others = {name: torch.randn_like(tensor) for name, tensor in packer.state_dict().items()}
    packer.load_state_dict(others, assign=True)


def learn_a_step(packer):
    packer(random_features()).square().sum().backward()
    torch.optim.AdamW(packer.parameters(), lr=0.1).step()


CHANGES = [
    write_in_place,
    write_through_data,
    write_a_row_through_data,
    write_a_column_through_data,
    exchange_data,
    exchange_a_parameter,
    load_other_weights,
    assign_other_weights,
    learn_a_step,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_weights_are_folded_anew(packer, change):
    features = random_features()
    before = fast(packer, features)
    change(packer)
    after = fast(packer, features)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, plain(packer, features), atol=1e-4, rtol=1e-4)  # values reach 100


def test_unchanged_weights_are_folded_once(packer, monkeypatch):
    folds = []
    monkeypatch.setattr(token_packer_fast, "fold", lambda packer: folds.append(1) or fold(packer))
    for scale in (1, 2, 3):
        fast(packer, random_features(), scale)
    assert len(folds) == 1


def test_a_moved_projector_forgets_its_folded_weights(packer):
    fast(packer, random_features())
    packer.double()
    assert not is_folded(packer)
    fast(packer, random_features(dtype=torch.float64))
    packer.to("meta")
    assert not is_folded(packer)


def test_folded_weights_are_in_no_state_and_no_copy(packer):
    names = set(packer.state_dict())
    features = random_features()
    expected = fast(packer, features)
    assert set(packer.state_dict()) == names
    assert len(list(packer.modules())) == len(list(copy.deepcopy(packer).modules()))
    for again in (copy.deepcopy(packer), pickle.loads(pickle.dumps(packer))):
        assert not is_folded(again)
        assert torch.equal(fast(again, features), expected)


def use_bfloat16(packer):
    packer.bfloat16()
    return random_features(dtype=torch.bfloat16)


def watch_a_layer(packer):
    packer.key_norm.register_forward_hook(lambda *_: None)
    return random_features()


def put_in_another_layer(packer):
    class Doubled(torch.nn.Linear):
        def forward(self, tokens):
            return 2 * super().forward(tokens)

    packer.output_mlp[2] = Doubled(24, 24)
    return random_features()


def put_in_another_attention(packer):
    class Uniform(WindowAttention):
        def weights(self, queries, keys, mask):
            return torch.full_like(super().weights(queries, keys, mask), 0.25)

    packer.attention.__class__ = Uniform
    return random_features()


def put_in_another_activation(packer):
    packer.key_mlp[1] = torch.nn.ReLU()
    return random_features()


def approximate_an_activation(packer):
    packer.key_mlp[1] = torch.nn.GELU(approximate="tanh")
    return random_features()


def put_in_one_more_layer(packer):
    packer.value_mlp.append(torch.nn.Linear(16, 16))
    return random_features()


def replace_a_forward(packer):
    norm = packer.value_norm
    norm.forward = lambda tokens: 2 * type(norm).forward(norm, tokens)
    return random_features()


PREPARATIONS = [
    use_bfloat16,
    watch_a_layer,
    put_in_another_layer,
    put_in_another_attention,
    put_in_another_activation,
    approximate_an_activation,
    put_in_one_more_layer,
    replace_a_forward,
]


@pytest.mark.parametrize("prepare", PREPARATIONS, ids=lambda prepare: prepare.__name__)
def test_what_folding_would_change_takes_the_plain_path(packer, prepare):
    features = prepare(packer)
    with torch.no_grad():
        packed = packer(features)
    assert not is_folded(packer)
    assert torch.equal(packed, plain(packer, features))


def test_a_narrow_projector_takes_the_plain_path(packer, monkeypatch):
    monkeypatch.setattr(token_packer_fast, "MIN_VISION_DIM", 17)
    with torch.no_grad():
        packer(random_features())
    assert not is_folded(packer)


def test_autocast_takes_the_plain_path(packer):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert packer(random_features()).dtype == torch.bfloat16
    assert not is_folded(packer)


def test_a_compiled_graph_holds_the_plain_path(packer):
    features = random_features((5, 7))
    compiled = torch.compile(packer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        packed = compiled(features)
    assert not is_folded(packer)
    torch.testing.assert_close(packed, plain(packer, features), atol=1e-5, rtol=1e-5)


def test_an_exported_program_holds_the_plain_path(packer):
    class Exportable(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.packer = packer

        def forward(self, query, levels):
            return self.packer(VisionFeatures(query, levels, (6, 6)))

    features = random_features()
    tiles = {0: torch.export.Dim("tiles", min=1, max=64)}
    with torch.no_grad():
        program = torch.export.export(Exportable(), (features.query, features.levels), dynamic_shapes=(tiles, tiles))
    more = random_features(num_tiles=5)
    torch.testing.assert_close(
        program.module()(more.query, more.levels), plain(packer, more).detach(), atol=1e-5, rtol=1e-5
    )


def test_vmap_and_forward_derivatives_take_the_plain_path(packer):
    features = random_features()
    expected = plain(packer, features)

    def pack(query, levels):
        return packer(VisionFeatures(query[None], levels[None], (6, 6)))[0]

    inputs = (features.query[0], features.levels[0])
    with torch.no_grad():
        packed = torch.vmap(pack)(features.query, features.levels)
        torch.testing.assert_close(packed, expected, atol=1e-5, rtol=1e-5)
        _, derivative = torch.func.jvp(pack, inputs, inputs)
    assert derivative.abs().max() > 0


def test_a_wrong_scale_factor_is_refused_as_on_the_plain_path(packer):
    with torch.no_grad(), pytest.raises(ValueError, match="scale_factor=7 exceeds patch_grid=6x6"):
        packer(random_features(), scale_factor=7)
