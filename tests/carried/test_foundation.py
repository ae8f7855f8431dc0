import json
import signal

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from tokenpacker.carried import foundation
from tokenpacker.carried.foundation import make_encoder, train_phase
from tokenpacker.train.config import OptimizerConfig, RunConfig
from tokenpacker.train.run_folder import COMPLETE, CONFIG, HISTORY

PHASE = RunConfig(
    name="numbers",
    optimizer=OptimizerConfig(learning_rate=0.01, muon_learning_rate=0.02, warmup_share=0.25),
    max_steps=12,
    batch_size=1,
    device_batch_size=1,
    precision="float32",
    checkpointing=False,
    save_every=5,
    report_to=(),
)


@pytest.fixture(autouse=True)
def no_workers(monkeypatch):
    monkeypatch.setattr(foundation, "NUM_WORKERS", 0)


def small_encoder():
    return CLIPVisionModel(
        CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8)
    )


def test_a_part_is_made_once_and_found_again(tmp_path):
    folder = make_encoder(tmp_path, small_encoder)
    assert make_encoder(tmp_path, lambda: pytest.fail("it is there already")) == folder
    assert json.loads((folder / "preprocessor_config.json").read_text()).keys() == {"image_mean", "image_std"}


def test_what_was_interrupted_is_made_again(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_encoder(tmp_path, interrupted)
    encoder = small_encoder()
    loaded = CLIPVisionModel.from_pretrained(make_encoder(tmp_path, lambda: encoder))
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in encoder.state_dict().items())


class Interrupted(Exception):
    """Stands for a power cut."""


class Numbers(torch.utils.data.Dataset):
    """Item `index` is a small regression problem; raises at `stop_at`."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == self.stop_at:
            raise Interrupted
        generator = torch.Generator().manual_seed(index)
        return {"inputs": torch.randn(4, 8, generator=generator)}


class Regression(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.heads = torch.nn.Linear(8, 8), torch.nn.Linear(8, 1)

    def forward(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.heads(self.hidden(inputs).tanh()) - inputs.sum(-1, keepdim=True)).square().mean()}


def run(folder, stop_at=None) -> dict[str, torch.Tensor]:
    model = Regression()
    assert train_phase(PHASE, model, Numbers(stop_at), folder)
    return model.state_dict()


def test_an_interrupted_phase_ends_exactly_as_an_uninterrupted_one(tmp_path):
    expected = run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(tmp_path / "broken", stop_at=8)
    resumed = run(tmp_path / "broken")
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    history = json.loads((tmp_path / "broken" / HISTORY).read_text())
    assert [entry["step"] for entry in history["steps"]] == list(range(1, 13))


def test_a_signal_ends_a_phase_with_a_checkpoint(tmp_path):
    class Signalled(Numbers):
        def __getitem__(self, index):
            if index == 3:
                signal.raise_signal(signal.SIGTERM)
            return super().__getitem__(index)

    assert not train_phase(PHASE, Regression(), Signalled(), tmp_path / "stopped")
    assert not (tmp_path / "stopped" / HISTORY).exists()
    resumed, expected = run(tmp_path / "stopped"), run(tmp_path / "whole")
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_a_phase_of_version_0_1_goes_on(tmp_path):
    """Its checkpoints have no mark, and its folder no config."""
    expected = run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(tmp_path / "broken", stop_at=8)
    (tmp_path / "broken" / CONFIG).unlink()
    (tmp_path / "broken" / "checkpoints" / "checkpoint-5" / COMPLETE).unlink()
    with pytest.raises(Interrupted):  # or it would have begun anew, and met the sixth item again
        run(tmp_path / "broken", stop_at=5)
    resumed = run(tmp_path / "broken")
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
