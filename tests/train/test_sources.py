"""What a run learns from, and what it must find again when it goes on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tokenpacker.train.assemble import load_processor
from tokenpacker.train.batches import IDS
from tokenpacker.train.config import DataConfig, ScenesConfig
from tokenpacker.train.run import train
from tokenpacker.train.sources import open_source


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


def test_without_data_the_option_is_named(run_config, tmp_path):
    config = replace(run_config, data=DataConfig())
    with pytest.raises(ValueError, match="give the data file with --data"):
        open_source(config, load_processor(config.model), tmp_path)


def test_scenes_are_drawn_without_a_file_and_need_an_end(run_config, tmp_path):
    pytest.importorskip("easy_vqa", reason="the easy-vqa package is not installed")
    data = DataConfig(scenes=ScenesConfig(captions=1.0))
    scenes = replace(run_config, data=data, scale_factors=(2,), batch_size=1, device_batch_size=1)
    processor = load_processor(scenes.model)
    with pytest.raises(ValueError, match="max_steps is missing, and generated scenes have no end"):
        open_source(scenes, processor, tmp_path)
    source = open_source(replace(scenes, max_steps=3), processor, tmp_path)
    assert source.num_steps == len(source.batches) == 3


def test_a_folder_of_another_run_is_refused(run_config, tmp_path):
    (tmp_path / "config.json").write_text(replace(run_config, seed=7).to_json())
    with pytest.raises(ValueError, match=r"holds a run with other settings \(seed\)"):
        train(run_config, tmp_path)
