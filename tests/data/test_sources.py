"""What a run learns from, and what it must find again when it goes on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from tokenpacker.data.batches import IDS
from tokenpacker.data.records import open_records
from tokenpacker.data.sources import open_source
from tokenpacker.train.assemble import assemble, load_processor
from tokenpacker.train.config import DataConfig, ScenesConfig
from tokenpacker.train.run import train


def test_batches_of_files_follow_from_their_number_alone(run_config, tmp_path):
    source = open_source(run_config, load_processor(run_config.model), tmp_path)
    again = open_source(run_config, load_processor(run_config.model), tmp_path / "elsewhere")
    assert source.num_steps == 20
    assert source.fingerprint == again.fingerprint
    one, other = source.batches[7], again.batches[7]
    assert one[IDS] == other[IDS]
    assert torch.equal(one["pixel_values"], other["pixel_values"])


def test_another_seed_is_another_source(run_config, tmp_path):
    processor = load_processor(run_config.model)
    prints = {open_source(replace(run_config, seed=seed), processor, tmp_path).fingerprint for seed in (1, 2)}
    assert len(prints) == 2


def test_elastic_steps_draw_one_scale_factor_for_all_their_batches(run_config, tmp_path):
    config = replace(run_config, scale_factors=(2, 4))
    source = open_source(config, load_processor(config.model), tmp_path)
    drawn = [source.batches[number]["scale_factor"] for number in range(32)]  # four batches a step
    steps = [set(drawn[start : start + 4]) for start in range(0, 32, 4)]
    assert all(len(step) == 1 for step in steps)
    assert set(drawn) == {2, 4}


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_in_a_trained_batch_of_every_kind_each_image_token_learns_from_its_own_tile(run_config, tmp_path, packed):
    """From the file on: grids of several tiles, several images in a sample, and text alone, in one step."""
    data = replace(run_config.data, packed=packed, grouped=False, max_length=1024)
    rows = 3 if packed else 8
    config = replace(run_config, data=data, batch_size=rows, device_batch_size=rows)
    source = open_source(config, load_processor(config.model), tmp_path)
    batch = source.batches[0]
    records = {record.id: record for record in open_records(data.path)}
    images = [len(records[id].images) for id in batch.pop(IDS)]
    assert {0, 1, 2} <= set(images)
    model, processor = assemble(config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(**batch).loss.backward()
    optimizer.step()

    pixels, entered = batch["pixel_values"].requires_grad_(), {}
    model.model.language_model.layers[0].register_forward_pre_hook(lambda _, args: entered.update(states=args[0]))
    losses = model(**batch).logits.logsumexp(-1)
    places = (batch["input_ids"] == processor.image_token_id).nonzero().tolist()
    tokens_per_tile = len(places) // len(batch["tile_index"])
    assert tokens_per_tile * len(batch["tile_index"]) == len(places)
    for number in range(0, len(places), tokens_per_tile):  # the first token of each tile, and its last
        tile = int(batch["tile_index"][number // tokens_per_tile])
        for row, column in (places[number], places[number + tokens_per_tile - 1]):
            (gradient,) = torch.autograd.grad(entered["states"][row, column].sum(), pixels, retain_graph=True)
            assert gradient.flatten(1).abs().sum(1).nonzero().flatten().tolist() == [tile]
    assert losses.isfinite().all()


def test_without_data_the_option_is_named(run_config, tmp_path):
    config = replace(run_config, data=DataConfig())
    with pytest.raises(ValueError, match="give the data file, shards or a hub id with --data"):
        open_source(config, load_processor(config.model), tmp_path)


def test_scenes_are_drawn_without_a_file_and_need_an_end(run_config, tmp_path):
    pytest.importorskip("easy_vqa", reason="the easy-vqa package is not installed")
    data = DataConfig(scenes=ScenesConfig(captions=1.0))
    model = replace(run_config.model, chat_format="bare")
    scenes = replace(run_config, model=model, data=data, scale_factors=(2,), batch_size=1, device_batch_size=1)
    processor = load_processor(scenes.model)
    with pytest.raises(ValueError, match="max_steps is missing, and generated scenes have no end"):
        open_source(scenes, processor, tmp_path)
    source = open_source(replace(scenes, max_steps=3), processor, tmp_path)
    assert source.num_steps == len(source.batches) == 3


def test_a_folder_of_another_run_is_refused(run_config, tmp_path):
    (tmp_path / "config.json").write_text(replace(run_config, seed=7).to_json())
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match=r"holds a run with other settings \(seed\)"):
        train(run_config, tmp_path)


def test_few_damaged_pictures_in_one_readers_share_do_not_stop_a_run(training_data, run_config, tmp_path):
    """Of 150 samples one is tolerated at 1 %, though it is more than that of the samples that its reader saw."""
    rows = json.loads(training_data.read_text())
    folder = tmp_path / "data"
    shutil.copytree(training_data.parent, folder)
    whole = (folder / "1-0.png").read_bytes()
    (folder / "torn.png").write_bytes(whole[: len(whole) // 2])
    many = [{**rows[2 if number % 2 else 1], "id": f"m{number}"} for number in range(150)]
    many[7]["image"] = "torn.png"
    (folder / "many.json").write_text(json.dumps(many))
    config = replace(run_config, data=replace(run_config.data, path=str(folder / "many.json")))
    source = open_source(config, load_processor(config.model), tmp_path)
    seen = [id for number in range(len(source.batches)) for id in source.batches[number][IDS]]
    assert len(set(seen) - {""}) == 149
    (line,) = (tmp_path / "rejects.jsonl").read_text().splitlines()
    assert json.loads(line)["source"].endswith("entry 8 in line 1")


def test_a_call_that_never_began_does_not_block_its_folder(run_config, tmp_path):
    (tmp_path / "config.json").write_text(replace(run_config, seed=7).to_json())
    train(replace(run_config, max_steps=1), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == run_config.seed


def test_a_sample_with_more_tiles_than_a_batch_may_hold_is_rejected_before_the_plan(run_config, tmp_path):
    config = replace(run_config, data=replace(run_config.data, max_tiles_per_batch=3, max_reject_share=1.0))
    source = open_source(config, load_processor(config.model), tmp_path)
    rejects = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert rejects
    assert all("tiles, more than max_tiles_per_batch=3; raise it" in row["reason"] for row in rejects)
    assert source.facts["samples used"] == f"{26 - len(rejects)} of 26"
