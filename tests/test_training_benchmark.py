"""The training benchmark compares like with like: its plain loop computes what the package computes."""

from __future__ import annotations

import pytest
import torch

from tokenpacker.data.collate import collate_packed
from tokenpacker.data.sources import RunData, look_through

pytest.importorskip("psutil")

from benchmarks.training.data import write_samples
from benchmarks.training.model import build
from benchmarks.training.plain import PlainModel, shuffled_batches
from benchmarks.training.settings import TILE_SIZE, Settings
from benchmarks.training.variant import run_package, run_plain, training_config, with_as_many_steps

NUM_SAMPLES, PER_STEP = 16, 4  # each kind fills a whole batch, as it does in the benchmark


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    write_samples(folder, NUM_SAMPLES, TILE_SIZE, seed=0)
    return folder


def settings_of(variant) -> Settings:
    return Settings(variant=variant, num_samples=NUM_SAMPLES, samples_per_step=PER_STEP, small=True)


def data_of(variant, folder) -> tuple:
    model, processor = build(settings_of(variant))
    config = training_config(settings_of(variant), folder)
    return model, config, look_through(config, processor, None)


def all_samples(data: RunData) -> list:
    return [data.maker.make(record) for record in (data.records[number] for number in range(NUM_SAMPLES))]


def test_every_sample_is_usable_and_there_are_all_kinds(folder):
    _, _, data = data_of("packed", folder)
    tiles = data.lengths.tiles
    assert len(data.lengths.usable) == NUM_SAMPLES
    assert (tiles == 0).any()
    assert (tiles == 1).any()
    assert (tiles > 1).any()


@pytest.mark.slow
def test_the_plain_loop_has_the_loss_of_the_package_on_the_same_samples(folder):
    model, _, data = data_of("packed", folder)
    samples = all_samples(data)
    batch = collate_packed([samples[:8], samples[8:]], pad_token_id=0)
    with torch.no_grad():
        ours, plain = model(**batch).loss, PlainModel(model)(samples)
    torch.testing.assert_close(plain, ours, rtol=0, atol=1e-5)  # float32 sums in another order


@pytest.mark.slow
def test_packed_rows_take_as_many_steps_as_padded_ones(folder):
    model, config, data = data_of("packed", folder)
    assert with_as_many_steps(data).rows < config.batch_size
    packed, grouped = run_package(model, config, data), run_package(*data_of("grouped", folder))
    plain = run_plain(*data_of("plain", folder))
    assert packed["steps"] == grouped["steps"] == plain["steps"] == NUM_SAMPLES / PER_STEP
    assert packed["fill"] > plain["fill"]


def test_the_plain_order_holds_every_sample_once():
    batches = list(shuffled_batches(10, 4, seed=1))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert sorted(number for batch in batches for number in batch) == list(range(10))
