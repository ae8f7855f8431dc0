"""A whole model of the region branch against outputs of the original code: region tokens, logits, loss, answers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from example_batches import batch_of
from golden_pictures import synthetic
from golden_regions import drawn, region_weights
from tokenpacker.checkpoints import load_released
from tokenpacker.data.labels import expand, prepare_example
from tokenpacker.hf import RELEASED_OPTIONS, TokenPackerImageProcessor
from tokenpacker.hf.regions.masks import mark_region
from tokenpacker.hf.regions.region_cells import Canvas
from tokenpacker.tiling import TileGrid

LOGITS = 2e-4  # as for models without regions
FEATURES = 2e-5


@pytest.fixture(scope="module")
def cases(golden):
    return json.loads((golden / "osprey" / "cases.json").read_text())


@pytest.fixture(scope="module")
def released(golden_checkpoint, tmp_path_factory):
    """The golden checkpoint with the region module in a shard of its own, and the tokenizer of the golden cases."""
    folder = tmp_path_factory.mktemp("osprey")
    for file in golden_checkpoint.iterdir():
        (folder / file.name).symlink_to(file)
    whole, regions = "pytorch_model.bin", "regions.bin"
    weights = region_weights(64)
    torch.save(weights, folder / regions)
    stored = torch.load(folder / whole, mmap=True, weights_only=True)
    weight_map = dict.fromkeys(stored, whole) | dict.fromkeys(weights, regions)
    (folder / f"{whole}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return load_released(folder, tokenizer_variant="fast")


def masks_of(case):
    return [[drawn(shape, (image["h"], image["w"])) for shape in image["shapes"]] for image in case["images"]]


def pictures_of(case):
    return [synthetic(image["h"], image["w"], image["seed"]) for image in case["images"]]


def assert_near(ours: torch.Tensor, stored: np.ndarray, tolerance: float) -> None:
    torch.testing.assert_close(ours, torch.from_numpy(stored), atol=tolerance, rtol=0)


def runs(line: torch.Tensor) -> list[int]:
    """Lengths of runs of 0 and 1 in turn, zeros first; nothing where the line ends as it should begin."""
    flat = [0, *line.int().tolist(), -1]
    changes = [place for place in range(len(flat) - 1) if flat[place] != flat[place + 1]]
    return [int(change) for change in np.diff([0, *changes])]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_masks_go_onto_the_canvas_as_in_the_original(cases, golden, number):
    case = cases["mask_rule"][number]
    images = TokenPackerImageProcessor(max_tiles=9, **RELEASED_OPTIONS)
    size = (case["h"], case["w"])
    grid = images.choose_grid(size)
    assert (grid.rows, grid.cols) == (case["h_block"], case["w_block"])
    for shape, stored in zip(case["shapes"], case["masks"], strict=True):
        canvas = Canvas(images, size, grid, (24, 24)).resized(mark_region(drawn(shape, size), size))
        assert tuple(canvas.shape) == grid.canvas_size((336, 336))
        assert int(canvas.sum()) == stored["pixels"]
        rows, cols = canvas.any(1).nonzero(), canvas.any(0).nonzero()
        assert [int(edge) for edge in (rows[0], cols[0], rows[-1], cols[-1])] == stored["bbox_yxyx_inclusive"]
        for row, expected in stored["row_runs"].items():
            assert runs(canvas[int(row)]) == expected
        for col, expected in stored["col_runs"].items():
            assert runs(canvas[:, int(col)]) == expected
    tiles = images.preprocess(synthetic(*size, case["seed"]), tile_grids=[TileGrid(grid.rows, grid.cols)])
    stored = np.load(golden / "osprey" / "mask_rule_tiles.npz")[f"{size[0]}x{size[1]}"]
    assert_near(tiles["pixel_values"][:, :, ::37, ::37], stored, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["generate_2x2", "generate_1x1"])
def test_answers_about_regions_are_the_originals(released, cases, golden, name):
    (model, processor), case = released, cases["model"][name]
    arrays = np.load(golden / "osprey" / f"model_{name}.npz")
    inputs = processor(pictures_of(case), case["prompt"], region_masks=masks_of(case), return_tensors="pt")
    ids = inputs["input_ids"]
    assert list(ids.shape) == case["expanded_shape"][:2]
    assert (ids == processor.region_token_id).nonzero()[:, 1].tolist() == case["mask_positions"][0]
    names = ("pixel_values", "scale_factors", "region_cells", "region_first_tile")
    with torch.no_grad():
        images = model.get_image_features(**{name: inputs.pop(name) for name in names})
        given = {"mm_encoder_outputs": {"image": images}}
        logits = model(**inputs, **given).logits[0]
    assert_near(images.region_tokens, arrays["mask_feats"], FEATURES)
    assert_near(logits[::24, ::11], arrays["logits_lattice"][0], LOGITS)
    assert_near(logits[-8:], arrays["logits_last8"][0], LOGITS)
    generated = model.generate(**inputs, **given, max_new_tokens=16, do_sample=False)
    assert min(case["generation_margins"]) > 1e-2
    assert generated[0, ids.shape[1] :].tolist() == case["generated_ids"]


@pytest.mark.slow
def test_the_loss_of_a_batch_with_regions_is_the_originals(released, cases, golden):
    (model, processor), case = released, cases["model"]["loss_two"]
    arrays = np.load(golden / "osprey" / "model_loss_two.npz")
    examples, mark = [], processor.image_token_id
    sizes = [(image["h"], image["w"]) for image in case["images"]]
    layouts = [processor.image_layout(size) for size in sizes]
    for conversation, layout in zip(case["conversations"], layouts, strict=True):
        example = prepare_example(conversation, processor.tokenizer, has_image=True)
        assert example.problem is None
        separators = (processor.tile_separator_id, processor.row_separator_id)
        examples.append(expand(example, mark, [layout.token_ids(mark, *separators)]))
    batch = batch_of(examples, processor.tokenizer.pad_token_id)
    assert batch["labels"].tolist() == case["expanded_labels"]
    grids = [layout.tile_grid for layout in layouts]
    batch |= processor.region_inputs(masks_of(case), sizes, grids)
    pixels = processor.image_processor(pictures_of(case), tile_grids=grids)["pixel_values"]
    with torch.no_grad():
        output = model(**batch, pixel_values=pixels)
    assert_near(output.region_hidden_states, arrays["mask_feats"], FEATURES)
    assert output.loss.item() == pytest.approx(case["loss"], abs=1e-5)
    for row, mask in enumerate(batch["attention_mask"]):
        length = int(mask.sum())
        lattice = output.logits[row, :length:24, ::11]
        assert_near(lattice, arrays["logits_lattice"][row, : len(lattice)], LOGITS)
        assert_near(output.logits[row, length - 8 : length], arrays["logits_last8"][row], LOGITS)
