import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golden_regions import drawn, region_weights
from golden_weights import seeded
from tokenpacker import RegionConfig, RegionEncoder, TileGrid, VisionFeatures
from tokenpacker.regions import cells_under, covered_share, scatter_region_tokens, tiles_of_cells

CASES = ["2x2", "1x1", "two_images", "2x2_out4096"]
TOLERANCE = 1e-5  # float32 sums over up to 576 patches in another order; the values reach 16


def golden_encoder(language_dim: int) -> RegionEncoder:
    encoder = RegionEncoder(RegionConfig(vision_dim=1024, language_dim=language_dim))
    names = {r"mask_extractor\.res_layers\.": "level_projs.", r"mask_extractor\.feat_linear\.": "output_proj."}
    weights = region_weights(language_dim)
    for theirs, ours in names.items():
        weights = {re.sub(theirs, ours, name): tensor for name, tensor in weights.items()}
    encoder.load_state_dict(weights)
    return encoder


def padded(cells: list[torch.Tensor]) -> torch.Tensor:
    """Weights of the regions of several images as one tensor, zeros behind the tiles of the smaller ones."""
    longest = max(part.shape[1] for part in cells)
    return torch.cat([torch.nn.functional.pad(part, (0, 0, 0, longest - part.shape[1])) for part in cells])


@pytest.mark.parametrize("name", CASES)
def test_region_tokens_are_the_originals(golden, name):
    case = json.loads((golden / "osprey" / "cases.json").read_text())["mask_extractor"][name]
    stored = np.load(golden / "osprey" / f"extractor_{name}.npz")
    levels = [seeded(f"osprey/{name}/feat{level}", (case["tiles"], 576, 1024)) for level in range(4)]
    features = VisionFeatures(levels[-1], torch.cat(levels, dim=-1), (24, 24))
    cells, first_tile, start = [], [], 0
    for image, active in zip(case["images"], case["active_cells"], strict=True):
        grid = TileGrid(image["h_block"], image["w_block"])
        masks = torch.stack([drawn(shape, grid.canvas_size((336, 336))) for shape in image["shapes"]])
        cells.append(tiles_of_cells(cells_under(masks, (14, 14), "centre"), grid))
        assert cells[-1].sum(dim=(1, 2)).tolist() == active
        first_tile += [start] * len(masks)
        start += grid.num_tiles
    with torch.no_grad():
        tokens = golden_encoder(case["out_dim"])(features, padded(cells), torch.tensor(first_tile))
    expected = torch.cat([torch.from_numpy(stored[f"out{image}"]) for image in range(len(case["images"]))])
    step = 16 if case["stored_columns"] == "::16" else 1
    torch.testing.assert_close(tokens[:, ::step], expected, atol=TOLERANCE, rtol=0)


def tokens_by_loops(encoder, features, masks_of_images, grids, patch, rule):
    """Region tokens as the method says: tiles put back into one map, and averaged under each mask, cell by cell."""
    (height, width), start, tokens = features.patch_grid, 0, []
    levels = features.levels.unflatten(2, (encoder.config.num_levels, -1))
    for masks, grid in zip(masks_of_images, grids, strict=True):
        for mask in masks:
            total, weight = torch.zeros(encoder.config.num_levels, encoder.config.vision_dim), 0.0
            for row in range(grid.rows * height):
                for col in range(grid.cols * width):
                    block = mask[row * patch : (row + 1) * patch, col * patch : (col + 1) * patch].float()
                    middle = slice((patch - 1) // 2, patch // 2 + 1)
                    share = block.mean() if rule == "coverage" else (block[middle, middle] > 0).any().float()
                    tile = start + row // height * grid.cols + col // width
                    total += share * levels[tile, row % height * width + col % width]
                    weight += share
            mean = total / weight if weight else total
            projected = [layer(mean[level]) for level, layer in enumerate(encoder.level_projs)]
            tokens.append(encoder.output_proj(sum(projected)))
        start += grid.num_tiles
    return torch.stack(tokens)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_tokens_are_the_means_under_the_masks_of_any_grids_and_images(data):
    patch, patch_grid, num_levels = data.draw(st.sampled_from([1, 2, 3])), (2, 3), 3
    rule = data.draw(st.sampled_from(["coverage", "centre"]))
    grids = [
        TileGrid(*pair) for pair in data.draw(st.lists(st.tuples(*[st.integers(1, 3)] * 2), min_size=1, max_size=3))
    ]
    counts = [data.draw(st.integers(0, 3)) for _ in grids]
    counts[-1] = max(counts[-1], 1)
    torch.manual_seed(data.draw(st.integers(0, 99)))
    tile_size = (patch_grid[0] * patch, patch_grid[1] * patch)
    masks = [torch.rand(n, *grid.canvas_size(tile_size)) > 0.6 for n, grid in zip(counts, grids, strict=True)]
    num_tiles = sum(grid.num_tiles for grid in grids)
    levels = torch.randn(num_tiles, 6, num_levels * 4)
    features = VisionFeatures(levels[..., :4], levels, patch_grid)
    encoder = RegionEncoder(RegionConfig(vision_dim=4, language_dim=5, num_levels=num_levels))
    starts = [sum(grid.num_tiles for grid in grids[:place]) for place in range(len(grids))]
    cells = [
        tiles_of_cells(cells_under(own, (patch, patch), rule), grid)
        for own, grid in zip(masks, grids, strict=True)
    ]  # fmt: skip
    first_tile = torch.tensor([start for start, own in zip(starts, masks, strict=True) for _ in own])
    expected = tokens_by_loops(encoder, features, masks, grids, patch, rule)
    # float32 sums of at most 54 cells in another order
    torch.testing.assert_close(encoder(features, padded(cells), first_tile), expected, atol=1e-6, rtol=1e-5)


@pytest.fixture
def small():
    """Encoder and features of four tiles of 2 x 2 patches, two levels of width 3."""
    levels = torch.randn(4, 4, 6)
    return RegionEncoder(RegionConfig(vision_dim=3, language_dim=5, num_levels=2)), levels


def features_of(levels):
    return VisionFeatures(levels[..., :3], levels, (2, 2))


def test_only_the_patches_under_a_region_change_its_token(small):
    encoder, levels = small
    cells = torch.zeros(2, 2, 4)
    cells[0, 0, 1], cells[1, 1, :2] = 1, 0.5
    first_tile = torch.tensor([0, 2])
    before = encoder(features_of(levels), cells, first_tile)
    changed = levels.clone()
    changed[0, 1] += 1
    changed[1] += 1  # no region has weight there
    after = encoder(features_of(changed), cells, first_tile)
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])


def test_the_scale_of_weights_does_not_matter(small):
    encoder, levels = small
    cells = torch.rand(3, 2, 4)
    first_tile = torch.tensor([0, 0, 2])
    once, thrice = (encoder(features_of(levels), cells * scale, first_tile) for scale in (1, 3))
    torch.testing.assert_close(thrice, once)


def test_a_region_without_weight_gets_what_the_biases_give(small):
    encoder, levels = small
    torch.nn.init.normal_(encoder.output_proj.bias)
    token = encoder(features_of(levels), torch.zeros(1, 1, 4), torch.tensor([0]))
    assert torch.equal(token[0], encoder.output_proj(sum(layer.bias for layer in encoder.level_projs)))


def test_tiles_that_are_kept_once_give_the_same_tokens(small):
    encoder, levels = small
    index = torch.tensor([2, 0, 2, 3, 1])
    cells, first_tile = torch.rand(3, 2, 4), torch.tensor([0, 2, 3])
    spread = encoder(features_of(levels[index]), cells, first_tile)
    assert torch.equal(encoder(features_of(levels), cells, first_tile, index), spread)


def test_no_regions_give_no_tokens_and_a_zero_gradient(small):
    encoder, levels = small
    encoder(features_of(levels), torch.zeros(0, 2, 4), torch.zeros(0, dtype=torch.int64)).sum().backward()
    assert all((parameter.grad == 0).all() for parameter in encoder.parameters())


def test_the_mean_is_exact_where_the_model_is_in_bfloat16(small):
    encoder, _ = small
    levels = torch.full((1, 4, 6), 1.0, dtype=torch.bfloat16)
    levels[0, 0] = 256.0  # 256 + 1 is no bfloat16
    encoder = encoder.bfloat16()
    with torch.no_grad():
        token = encoder(features_of(levels), torch.ones(1, 1, 4), torch.tensor([0]))
        mean = torch.full((3,), (256 + 3) / 4).bfloat16()
        expected = encoder.output_proj(torch.stack([layer(mean) for layer in encoder.level_projs]).sum(0))
    assert torch.equal(token[0], expected)


def test_coverage_is_exact_for_cells_that_cut_pixels():
    mask = torch.tensor([[[1, 0], [1, 1]]])
    share = covered_share(mask, torch.tensor([[-1.0, 0.5], [0.5, 2.0]]), torch.tensor([[0.0, 1.5], [1.5, 3.0]]))
    # Cells have an area of 2.25. The upper left one holds half of pixel (0, 0); the lower left one its other half, and
    # one and a half pixels of the lower row; the lower right one the half pixel that is left.
    expected = torch.tensor([[[0.5, 0.0], [0.5 + 1.5, 0.5]]]) / 2.25
    torch.testing.assert_close(share, expected)


def test_a_region_smaller_than_a_patch_counts_by_its_share_and_not_at_all_by_the_released_rule():
    mask = torch.zeros(1, 28, 28)
    mask[0, 0, 0] = 1
    assert cells_under(mask, (14, 14), "coverage")[0].tolist() == [[pytest.approx(1 / 196), 0], [0, 0]]
    assert not cells_under(mask, (14, 14), "centre").any()


def test_the_thumbnail_has_no_weight():
    cells = torch.arange(1, 17.0).view(1, 4, 4)
    tiles = tiles_of_cells(cells, TileGrid(2, 2))
    assert tiles[0].tolist() == [[1, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16], [0] * 4]
    assert tiles_of_cells(cells, TileGrid(1, 1)).shape == (1, 1, 16)


def test_region_tokens_stand_where_their_placeholders_are():
    embeddings, ids = torch.zeros(2, 3, 2), torch.tensor([[7, 1, 7], [1, 7, 1]])
    placed = scatter_region_tokens(embeddings, ids, torch.arange(1, 7.0).view(3, 2), 7)
    assert placed.tolist() == [[[1, 2], [0, 0], [3, 4]], [[0, 0], [5, 6], [0, 0]]]
    with pytest.raises(ValueError, match="hold 3 region tokens but there are 2 regions"):
        scatter_region_tokens(embeddings, ids, torch.zeros(2, 2), 7)


def test_inputs_that_do_not_fit_are_refused(small):
    encoder, levels = small
    features = features_of(levels)
    with pytest.raises(ValueError, match=r"region cells are \(1, 1, 9\) .* expected \(regions, tiles, 4\)"):
        encoder(features, torch.ones(1, 1, 9), torch.tensor([0]))
    with pytest.raises(ValueError, match="begins at tile 3 and has weights up to tile 4, but there are 4 tiles"):
        encoder(features, torch.ones(1, 2, 4), torch.tensor([3]))
    with pytest.raises(ValueError, match="num_levels=1 but the region encoder was built for num_levels=2"):
        encoder(VisionFeatures(levels[..., :3], levels[..., :3], (2, 2)), torch.ones(1, 1, 4), torch.tensor([0]))
    with pytest.raises(ValueError, match="region_rule='middle' is unknown; use 'coverage' or 'centre'"):
        cells_under(torch.ones(1, 4, 4), (2, 2), "middle")
    with pytest.raises(ValueError, match=r"canvas that patches of 3x3 pixels cover"):
        cells_under(torch.ones(1, 4, 4), (3, 3))
    with pytest.raises(ValueError, match="vision_dim=0 must be an integer of at least 1"):
        RegionConfig(vision_dim=0, language_dim=4)


def test_a_bare_tensor_is_refused_with_the_way_to_make_features():
    encoder = RegionEncoder(RegionConfig(vision_dim=8, language_dim=16, num_levels=2))
    with pytest.raises(ValueError, match="the region encoder takes VisionFeatures, not Tensor; make them"):
        encoder(torch.zeros(1, 4, 16), torch.ones(1, 1, 4), torch.zeros(1, dtype=torch.long))


def test_features_of_another_type_of_numbers_give_tokens_in_the_encoders_own():
    encoder = RegionEncoder(RegionConfig(vision_dim=8, language_dim=16, num_levels=2))
    half = VisionFeatures(torch.randn(1, 4, 8).half(), torch.randn(1, 4, 16).half(), (2, 2))
    assert encoder(half, torch.ones(1, 1, 4), torch.zeros(1, dtype=torch.long)).dtype == torch.float32


def regions_of_two_images(num_tiles):
    """Features of `num_tiles`, the last of which is an image of its own, and a region in each image."""
    features = VisionFeatures(torch.randn(num_tiles, 4, 8), torch.randn(num_tiles, 4, 16), (2, 2))
    cells = torch.rand(2, num_tiles - 1, 4)
    cells[1, 1:] = 0  # behind the last tile
    return features, cells, torch.tensor([0, num_tiles - 1])


def test_compiled_and_exported_it_gives_the_same_for_any_number_of_tiles():
    encoder = RegionEncoder(RegionConfig(vision_dim=8, language_dim=16, num_levels=2))
    tiles = torch.export.Dim("tiles", min=2, max=64)
    shapes = ([{0: tiles}, {0: tiles}], {1: tiles - 1}, None)
    program = torch.export.export(encoder, regions_of_two_images(4), dynamic_shapes=shapes).module()
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    for num_tiles in (4, 6):
        inputs = regions_of_two_images(num_tiles)
        for run in (program, compiled):
            torch.testing.assert_close(run(*inputs), encoder(*inputs), atol=1e-6, rtol=1e-5)
