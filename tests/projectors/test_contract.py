"""What every registered projector promises; a new one is tested by being registered."""

import dataclasses
import json
import re

import pytest
import torch

from tokenpacker import VisionFeatures
from tokenpacker.projectors import RECOMMENDED_TOKEN_PACKER, available, build, config_from_dict, load, save

WIDTHS = {"vision_dim": 16, "language_dim": 24, "num_levels": 3}
GRID = (6, 6)
SEES_MORE_THAN_ITS_WINDOW = {"c-abstractor", "ldp-v2", "resampler"}  # by convolutions, or by attention to the tile
HONOUR_ONE_SCALE_FACTOR = {"mlp", "pixel-shuffle", "resampler"}


@pytest.fixture(params=[*available(), RECOMMENDED_TOKEN_PACKER], ids=str)
def projector(request):
    settings = request.param if isinstance(request.param, dict) else {"name": request.param}
    return build({**settings, **WIDTHS})


def build_for(name, grid, scale):
    """A projector for a scale factor on a grid, by the field that its method has for it."""
    fields = {"mlp": {}, "resampler": {"query_grid": (grid[0] // scale, grid[1] // scale)}}
    return build({"name": name, **WIDTHS, **fields.get(name, {"scale_factor": scale})})


def features(grid=GRID, num_tiles=2, dtype=torch.float32):
    length = grid[0] * grid[1]
    query = torch.randn(num_tiles, length, 16, dtype=dtype)
    return VisionFeatures(query, torch.randn(num_tiles, length, 48, dtype=dtype), grid)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("grid", [(12, 12), (24, 24), (12, 24)])
@pytest.mark.parametrize("name", available())
def test_the_config_counts_what_the_module_gives(name, grid, scale):
    projector = build_for(name, grid, scale)
    side = 1 if name == "mlp" else scale
    assert projector.config.token_grid(grid) == (grid[0] // side, grid[1] // side)
    assert projector(features(grid, num_tiles=1)).shape == (1, projector.config.num_tokens(grid), 24)


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 6, 7])
def test_a_call_takes_the_scale_factors_that_the_config_counts_and_no_others(projector, scale):
    try:
        num_tokens = projector.config.num_tokens(GRID, scale)
    except ValueError as refusal:
        with pytest.raises(ValueError, match=re.escape(str(refusal))):
            projector(features(), scale)
    else:
        assert projector(features(), scale).shape == (2, num_tokens, 24)


@pytest.mark.parametrize("name", [name for name in available() if name not in HONOUR_ONE_SCALE_FACTOR])
def test_one_set_of_weights_serves_every_scale_factor_that_fits_the_grid(name):
    projector = build({"name": name, **WIDTHS})
    for scale in (1, 2, 3, 4, 6):
        assert projector(features((12, 12)), scale).shape[1] == (12 // scale) ** 2
    assert projector(features((5, 7)), 2).shape[1] == 3 * 4  # windows at the edge hold what is there
    with pytest.raises(ValueError, match="scale_factor=13 exceeds patch_grid=12x12; use at most 12"):
        projector(features((12, 12)), 13)


@pytest.mark.parametrize("scale", [0, -1, 2.0, True])
@pytest.mark.parametrize("name", [name for name in available() if name not in HONOUR_ONE_SCALE_FACTOR])
def test_a_scale_factor_that_is_no_count_is_refused(name, scale):
    projector = build({"name": name, **WIDTHS})
    for refused in (
        lambda: projector(features(), scale),
        lambda: build({"name": name, **WIDTHS, "scale_factor": scale}),
    ):
        with pytest.raises(ValueError, match=f"scale_factor={scale} must be an integer of at least 1"):
            refused()


def tokens_changed_by_a_window(projector, grid, token):
    """Which packed tokens differ after all patches behind one of them became others."""
    inputs, others = features(grid, num_tiles=1), features(grid, num_tiles=1)
    rows, cols = projector.config.token_grid(grid)
    height, width = grid[0] // rows, grid[1] // cols
    row, col = divmod(token, cols)
    window = torch.zeros(grid, dtype=torch.bool)
    window[row * height : (row + 1) * height, col * width : (col + 1) * width] = True
    query, levels = (
        torch.where(window.view(1, -1, 1), other, given)
        for given, other in ((inputs.query, others.query), (inputs.levels, others.levels))
    )
    changed = projector(VisionFeatures(query, levels, grid)) != projector(inputs)  # (1, T, D)
    return changed.any(-1)[0].nonzero().flatten().tolist()


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("name", available())
def test_a_window_changes_its_own_token_and_no_other_where_the_method_is_local(name, scale):
    grid = (12, 24)
    projector = build_for(name, grid, scale).eval()
    rows, cols = projector.config.token_grid(grid)
    for token in (0, cols + 1, rows * cols - 1):
        changed = tokens_changed_by_a_window(projector, grid, token)
        assert (changed == [token]) == (name not in SEES_MORE_THAN_ITS_WINDOW)


def test_the_config_survives_json(projector):
    assert config_from_dict(json.loads(json.dumps(projector.config.to_dict()))) == projector.config


def test_the_loss_reaches_every_parameter(projector):
    projector(features()).square().mean().backward()
    unreached = [name for name, parameter in projector.named_parameters() if parameter.grad is None]
    assert unreached == []


def test_no_weight_is_left_as_memory_was(projector):
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.fill_(float("nan"))
    for layer in projector.modules():
        if isinstance(layer, torch.nn.LayerNorm):
            layer.reset_parameters()  # a model does that by itself
    projector.init_weights()
    assert [name for name, parameter in projector.named_parameters() if not parameter.isfinite().all()] == []


def test_tiles_do_not_influence_each_other(projector):
    inputs = features(num_tiles=3)
    alone = VisionFeatures(inputs.query[1:2], inputs.levels[1:2], GRID)
    torch.testing.assert_close(projector(inputs)[1:2], projector(alone), atol=1e-6, rtol=1e-5)


def test_bfloat16_goes_in_and_out(projector):
    assert projector.bfloat16()(features(dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_it_compiles_without_graph_breaks_for_any_number_of_tiles(projector):
    graphs = []
    compiled = torch.compile(projector, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    for num_tiles in (2, 5):
        inputs = features(num_tiles=num_tiles)
        for tensor in (inputs.query, inputs.levels):
            torch._dynamo.mark_dynamic(tensor, 0)
        torch.testing.assert_close(compiled(inputs), projector(inputs), atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1


@pytest.mark.parametrize("strict", [False, True])
def test_exported_and_saved_it_takes_any_number_of_tiles_of_its_grid(projector, strict, tmp_path):
    tiles = {0: torch.export.Dim("tiles", min=1, max=64)}
    program = torch.export.export(projector, (features(),), dynamic_shapes=([tiles, tiles],), strict=strict)
    torch.export.save(program, tmp_path / "projector.pt2")
    program = torch.export.load(tmp_path / "projector.pt2").module()
    for num_tiles in (1, 5):
        inputs = features(num_tiles=num_tiles)
        torch.testing.assert_close(program(inputs), projector(inputs), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="tree spec"):
        program(features((4, 9)))


def test_saved_and_loaded_it_gives_the_same(projector, tmp_path):
    save(projector.config, projector.state_dict(), tmp_path / "projector.safetensors")
    again = load(tmp_path / "projector.safetensors")
    inputs = features()
    assert again.config == projector.config
    assert torch.equal(again(inputs), projector(inputs))


def test_features_of_other_widths_are_refused(projector):
    narrow = VisionFeatures(torch.randn(1, 36, 8), torch.randn(1, 36, 24), GRID)
    with pytest.raises(ValueError, match="vision_dim=8"):
        projector(narrow)


@pytest.mark.parametrize("wrong", [torch.zeros(2, 36, 16), [torch.zeros(2, 36, 16)], None])
def test_what_is_no_features_is_refused_with_the_way_to_make_them(projector, wrong):
    with pytest.raises(ValueError, match=rf"takes VisionFeatures, not {type(wrong).__name__}; make them .*from_hidden"):
        projector(wrong)


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_features_of_another_type_of_numbers_are_refused(projector, own):
    with pytest.raises(ValueError, match=rf"features are torch.float16 but the .* projector is {own}; convert one"):
        projector.to(own)(features(dtype=torch.float16))


def test_autocast_converts_features_of_another_type_of_numbers(projector):
    with torch.autocast("cpu", torch.bfloat16):
        assert projector(features(dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_the_config_is_frozen(projector):
    with pytest.raises(dataclasses.FrozenInstanceError):
        projector.config.vision_dim = 3


def test_an_unknown_name_is_answered_with_all_valid_ones():
    with pytest.raises(ValueError, match=f"unknown projector 'q-former'; available: {', '.join(available())}$"):
        build({"name": "q-former", **WIDTHS})
