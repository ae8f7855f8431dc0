"""TokenPacker against the paper's equations, written as slow loops, and against the outputs of the original code."""

import json
import math
import re

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from golden_weights import golden_features, golden_packer, original_names, run_golden_cases
from tokenpacker import TokenPacker, TokenPackerProjectorConfig, VisionFeatures
from tokenpacker.projectors.token_packer import coarse_query, windows


def random_features(grid, num_tiles=2, vision_dim=16, num_levels=3, **kwargs):
    length = grid[0] * grid[1]
    return VisionFeatures(
        torch.randn(num_tiles, length, vision_dim, **kwargs),
        torch.randn(num_tiles, length, vision_dim * num_levels, **kwargs),
        grid,
    )


def random_packer(scale_factor=2, **kwargs):
    defaults = {"vision_dim": 16, "language_dim": 24, "num_levels": 3, "num_heads": 4}
    packer = TokenPacker(TokenPackerProjectorConfig(scale_factor=scale_factor, **(defaults | kwargs)))
    for parameter in packer.parameters():  # biases too, so that a forgotten one shows
        torch.nn.init.normal_(parameter, std=0.3)
    return packer


def slow_packer(packer, features, scale):
    """The paper's equations, one packed token and one head at a time; edge windows hold the patches that exist."""
    height, width = features.patch_grid
    attention, heads = packer.attention, packer.config.num_heads
    tokens = []
    for tile in range(features.query.shape[0]):
        query_map = features.query[tile].reshape(height, width, -1)
        keys = packer.key_norm(packer.key_mlp(features.levels[tile])).reshape(height, width, -1)
        values = packer.value_norm(packer.value_mlp(features.levels[tile])).reshape(height, width, -1)
        for row in range(math.ceil(height / scale)):
            for col in range(math.ceil(width / scale)):
                centre = [((2 * i + 1) * scale - 1) / 2 for i in (row, col)]  # of the window, in patch coordinates
                corners = [
                    query_map[min(y, height - 1), min(x, width - 1)]
                    for y in (math.floor(centre[0]), math.ceil(centre[0]))
                    for x in (math.floor(centre[1]), math.ceil(centre[1]))
                ]
                query = packer.query_norm(packer.query_proj(sum(corners) / 4))
                ys = range(row * scale, min((row + 1) * scale, height))
                xs = range(col * scale, min((col + 1) * scale, width))
                q = attention.query_proj(query).chunk(heads)
                k = [attention.key_proj(keys[y, x]).chunk(heads) for y in ys for x in xs]
                v = [attention.value_proj(values[y, x]).chunk(heads) for y in ys for x in xs]
                mixed = []
                for head in range(heads):
                    scores = torch.stack([q[head] @ key[head] for key in k]) / math.sqrt(q[head].numel())
                    mixed.append(sum(p * value[head] for p, value in zip(scores.softmax(0), v, strict=True)))
                tokens.append(packer.output_mlp(attention.output_proj(torch.cat(mixed))))
    return torch.stack(tokens).reshape(features.query.shape[0], -1, packer.config.language_dim)


@pytest.mark.parametrize(
    ("grid", "scale"), [((6, 6), 2), ((6, 6), 3), ((8, 4), 4), ((5, 7), 2), ((7, 5), 3), ((4, 6), 1)]
)
def test_the_module_equals_a_slow_loop_over_the_equations(grid, scale):
    packer, features = random_packer(scale), random_features(grid)
    # float32 sums in another order: rounding, far below any real difference
    torch.testing.assert_close(packer(features), slow_packer(packer, features, scale), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("grid", "scale"), [((6, 6), 2), ((6, 9), 3), ((5, 5), 2)])
def test_a_packed_token_depends_only_on_its_own_window(grid, scale):
    packer, features = random_packer(scale), random_features(grid, num_tiles=1)
    before = packer(features)
    cols = math.ceil(grid[1] / scale)
    for patch in range(grid[0] * grid[1]):
        query, levels = features.query.clone(), features.levels.clone()
        query[:, patch] += 1
        levels[:, patch] += 1
        after = packer(VisionFeatures(query, levels, grid))
        changed = (after != before).any(-1)[0].nonzero().flatten().tolist()
        row, col = divmod(patch, grid[1])
        assert changed == [row // scale * cols + col // scale]


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_coarse_query_is_bilinear_interpolation_where_the_scale_divides_the_grid(scale):
    tokens = torch.randn(2, 144, 16)
    image = tokens.transpose(1, 2).reshape(2, 16, 12, 12)
    bilinear = F.interpolate(image, scale_factor=1 / scale, mode="bilinear", align_corners=False)
    torch.testing.assert_close(coarse_query(tokens, (12, 12), scale), bilinear.flatten(2).transpose(1, 2))


def test_edge_windows_ignore_what_lies_beyond_the_grid():
    packer, features = random_packer(2), random_features((27, 27), num_tiles=1)
    weights = packer.attention_weights(features)  # (1, 14*14, heads, 4)
    assert packer(features).shape == (1, 196, 24)
    corner = weights[0, -1]
    assert (corner[:, 0] == 1).all()  # the last window holds a single patch
    assert (corner[:, 1:] == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 196, 4))


def test_attention_weights_are_those_that_forward_uses():
    packer, features = random_packer(2), random_features((5, 6))
    values = windows(packer.value_norm(packer.value_mlp(features.levels)), (5, 6), 2)
    values = packer.attention.value_proj(values).unflatten(-1, (4, -1))  # (W, N, T, H, C/H)
    mixed = torch.einsum("nthw,wnthc->nthc", packer.attention_weights(features), values).flatten(2)
    expected = packer.output_mlp(packer.attention.output_proj(mixed))
    torch.testing.assert_close(packer(features), expected, atol=1e-5, rtol=1e-4)


def test_one_set_of_weights_serves_every_scale_factor():
    packer, features = random_packer(2), random_features((12, 12))
    for scale in (1, 2, 3, 4, 5, 12):
        assert packer(features, scale_factor=scale).shape[1] == packer.config.num_tokens((12, 12), scale)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (13, "scale_factor=13 exceeds patch_grid=12x12; use at most 12"),
        (0, "scale_factor=0"),
        (2.0, "scale_factor=2.0"),
    ],
)
def test_a_scale_factor_that_cannot_be_is_refused(scale, message):
    with pytest.raises(ValueError, match=message):
        random_packer()(random_features((12, 12)), scale_factor=scale)


def test_features_of_another_width_are_refused():
    with pytest.raises(ValueError, match="num_levels=2 but token-packer was built for num_levels=3"):
        random_packer()(random_features((4, 4), num_levels=2))


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="num_heads=3 does not divide vision_dim=16"):
        TokenPackerProjectorConfig(vision_dim=16, language_dim=8, num_heads=3)


@pytest.mark.parametrize(("width", "std"), [(1024, 0.02), (256, 0.04)])
def test_fresh_weights_pass_signals_on_as_strongly_at_every_width_and_biases_are_zero(width, std):
    packer = TokenPacker(TokenPackerProjectorConfig(vision_dim=width, language_dim=256))
    for name, parameter in packer.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" not in name:
            assert 0.9 * std < parameter.std() < 1.1 * std, name  # truncated at two absolute units, so hardly at all


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_within_the_rounding_of_its_type(dtype):
    packer, features = random_packer(), random_features((6, 6))
    exact = packer(features)
    with torch.autocast("cpu", dtype):
        rounded = packer(features)
    assert rounded.dtype == dtype
    step = torch.finfo(dtype).eps
    # about ten roundings lie between input and output
    assert (rounded.float() - exact).abs().max() < 10 * step * exact.abs().max()


def test_a_module_in_bfloat16_takes_and_gives_bfloat16():
    packer, features = random_packer().bfloat16(), random_features((5, 5), dtype=torch.bfloat16)
    assert packer(features).dtype == torch.bfloat16


@pytest.mark.parametrize("grid", [(6, 6), (5, 7)])
def test_compiled_without_graph_breaks_it_gives_the_same(grid):
    packer, features = random_packer(), random_features(grid)
    compiled = torch.compile(packer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features), packer(features), atol=1e-5, rtol=1e-5)


class Exportable(torch.nn.Module):
    """Tensors in, tensors out: what `torch.export` wants to see."""

    def __init__(self, packer, grid):
        super().__init__()
        self.packer, self.grid = packer, grid

    def forward(self, query, levels):
        return self.packer(VisionFeatures(query, levels, self.grid))


@pytest.mark.parametrize("grid", [(6, 6), (5, 7)])
def test_exported_with_a_dynamic_batch_it_runs_at_other_batch_sizes(grid):
    packer, features = random_packer().eval(), random_features(grid, num_tiles=2)
    batch = torch.export.Dim("tiles", min=1, max=64)
    program = torch.export.export(
        Exportable(packer, grid), (features.query, features.levels), dynamic_shapes=({0: batch}, {0: batch})
    )
    more = random_features(grid, num_tiles=5)
    torch.testing.assert_close(program.module()(more.query, more.levels), packer(more), atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients():
    packer = random_packer()
    features = random_features((6, 6))

    def gradients(run):
        packer.zero_grad()
        run(features).square().mean().backward()
        return [parameter.grad.clone() for parameter in packer.parameters()]

    plain = gradients(packer)
    checkpointed = gradients(lambda x: torch.utils.checkpoint.checkpoint(packer, x, use_reentrant=False))
    for one, other in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(one, other)


def reference_order(packer, features):
    """The published operations in the original's order: tiles behind tokens, stock attention over all windows at once.

    For grids that the scale factor divides.
    """
    scale, (height, width) = packer.config.scale_factor, features.patch_grid
    num_tiles, _, channels = features.query.shape

    def windows(tokens, side):  # (N, L, C) -> (side*side, T*N, C)
        image = tokens.unflatten(1, (height // scale, side, width // scale, side))  # (N, rows, side, cols, side, C)
        return image.permute(2, 4, 1, 3, 0, 5).reshape(side * side, -1, channels)

    attention = torch.nn.MultiheadAttention(channels, packer.config.num_heads, dtype=features.query.dtype)
    named = original_names(packer, lambda parameter: parameter.detach())
    attention.load_state_dict({name: named[f"clip_attn.{name}"] for name in attention.state_dict()})

    image = features.query.float().transpose(1, 2).unflatten(2, (height, width))  # (N, C, h, w)
    coarse = F.interpolate(image, scale_factor=1 / scale, mode="bilinear").flatten(2).transpose(1, 2)  # (N, T, C)
    query = packer.query_norm(packer.query_proj(coarse.contiguous().to(features.query.dtype)))
    key = packer.key_norm(packer.key_mlp(features.levels))
    value = packer.value_norm(packer.value_mlp(features.levels))
    attended, _ = attention(windows(query, 1), windows(key, scale), windows(value, scale))  # (1, T*N, C)
    return packer.output_mlp(attended.view(-1, num_tiles, channels).transpose(0, 1))


# Widths and scale factors that no golden file holds, and the widths of the 7B and the 13B model.
@pytest.mark.parametrize("case", ["s2_h5120", "s3_h4096", "s4_h5120", "s1_h64", "s6_h64"])
def test_at_any_width_and_scale_it_rounds_like_stock_attention(case):
    packer, features = golden_packer(case), golden_features(case)
    with torch.inference_mode():
        difference = (packer(features) - reference_order(packer, features)).abs().max()
    # Two float32 orders of summation differ by 3e-5 at these widths, where values reach 44. Here all but one are the
    # same: the original adds the bias of the first output linear last, which moves results by up to 1.3e-5.
    assert difference < (2e-5 if packer.config.language_dim > 64 else 2e-6)


GOLDEN_CASES = ["s2_h64", "s3_h64", "s4_h64", "s2_h4096"]


@pytest.fixture(scope="module")
def golden_results(golden, tmp_path_factory):
    return run_golden_cases(GOLDEN_CASES, tmp_path_factory.mktemp("golden") / "results.pt")


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_outputs_equal_those_of_the_original_code(golden, golden_results, case):
    stored = {name: torch.from_numpy(array) for name, array in np.load(golden / "projector" / f"{case}.npz").items()}
    out = golden_results[case]["out"]
    if "out" in stored:
        # values reach 4; 6e-7 where the kernels are those of the original's processor, 7e-6 with other vector widths
        assert (out - stored["out"]).abs().max() < 1e-5
    else:
        assert (out[:, ::8, :64] - stored["out_slice"]).abs().max() < 2e-5  # values reach 44; 8e-6 measured
        # means and deviations over 4096 channels average the rounding away
        torch.testing.assert_close(out.mean(-1), stored["out_token_mean"], atol=2e-6, rtol=0)
        torch.testing.assert_close(out.std(-1, correction=0), stored["out_token_std"], atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_gradients_equal_those_of_the_original_code(golden, golden_results, case):
    stored = np.load(golden / "projector" / f"{case}.npz")
    gradients = golden_results[case]
    # 1e-4 of the largest value: float32 backward sums hundreds of thousands of terms, and the original is 3e-6 from
    # float64; a wrong or missing path would differ by its whole size
    for key in (key for key in stored if key.startswith("grad:")):
        name, rows = re.fullmatch(r"grad:(.+)\[(.+),:8\]", key).groups()
        start, stop = (int(number or 0) for number in rows.split(":"))
        expected = torch.from_numpy(stored[key])
        difference = (gradients[name][start:stop, :8] - expected).abs().max()
        assert difference < 1e-4 * expected.abs().max(), key

    norms = json.loads((golden / "projector" / "report.json").read_text())[case]["grad_norms"]
    del norms["ln_k_1.bias"]  # zero in exact arithmetic: what is stored is noise
    for name, norm in norms.items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-4), name


@pytest.mark.parametrize("case", ["s2_h64", "s3_h64", "s4_h64"])
def test_in_bfloat16_it_stays_within_bfloat16_rounding_of_the_original_code(golden, case):
    expected = torch.from_numpy(np.load(golden / "projector" / f"{case}.npz")["out"])
    packer, features = golden_packer(case).bfloat16(), golden_features(case)
    features = VisionFeatures(features.query.bfloat16(), features.levels.bfloat16(), features.patch_grid)
    with torch.inference_mode():
        error = (packer(features) - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    # About 34 roundings lie between input and output: input, weight and output of each linear, norm, GELU and product,
    # on the value's way and on that of query and key. Each is at most half a step, so a step / sqrt(12) on average,
    # and independent ones add in squares. The original's operations in bfloat16 come to 1.06e-2, ours to 1.03e-2.
    assert error < math.sqrt(34 / 12) * torch.finfo(torch.bfloat16).eps  # 1.3e-2
