"""Two runs of the same config give the same bits on a CPU, also with threads that wait for each other."""

from __future__ import annotations

import pytest
import torch

from tokenpacker.train.callbacks import deterministic_on_cpu


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_gradients_of_tiles_that_occur_often_do_not_depend_on_the_threads_timing(threads):
    """As `packed[tile_index]` of a batch in which an image comes again and again: 4 in about 300 differ else."""
    torch.manual_seed(0)
    tiles = torch.randn(4, 144, 128, requires_grad=True)
    tile_index, upstream = torch.tensor([0, 1, 2, 3] * 6), torch.randn(24, 144, 128)

    def gradients(times):
        found = set()
        for _ in range(times):
            tiles.grad = None
            tiles[tile_index].backward(upstream)
            found.add(tiles.grad.numpy().tobytes())
        return found

    with deterministic_on_cpu():
        assert len(gradients(40)) == 1


def test_the_setting_holds_for_the_training_alone(run_config, tmp_path, monkeypatch):
    from dataclasses import replace

    from tokenpacker.train.run import train
    from tokenpacker.train.trainer import PartTrainer

    seen, original = [], PartTrainer.training_step

    def training_step(*arguments, **options):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return original(*arguments, **options)

    monkeypatch.setattr(PartTrainer, "training_step", training_step)
    train(replace(run_config, max_steps=1), tmp_path)
    assert set(seen) == {True}
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
