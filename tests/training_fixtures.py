"""A small data set of every kind of sample, and the config of a run on it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tokenpacker.train.config import DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
from train_runs import Start, start

# (images as (height, width), words in the answer): text alone, one tile, grids of several, several images.
KINDS = (((), 5), (((32, 32),), 1), (((32, 90),), 3), (((70, 64), (32, 32)), 2), ((), 9), (((96, 40),), 7))


@pytest.fixture(scope="session")
def training_data(tmp_path_factory, image_of):
    """A file of 26 conversations; the pictures lie beside it."""
    folder = tmp_path_factory.mktemp("training-data")
    rows = []
    for number in range(26):
        sizes, words = KINDS[number % len(KINDS)]
        names = [f"{number}-{place}.png" for place in range(len(sizes))]
        for place, (name, size) in enumerate(zip(names, sizes, strict=True)):
            image_of(*size, seed=10 * number + place).save(folder / name)
        question, answer = "<image>\n" * len(names) + f"what is {number}?", "so " * words + str(number)
        talk = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        image = {"image": names if len(names) > 1 else names[0]} if names else {}
        rows.append({"id": f"s{number}", "conversations": talk} | image)
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


@pytest.fixture(scope="session")
def run_config(training_data, tiny_model_dir):
    """Trains projector and language model of the tiny model, padded, on HD tiles."""
    return TrainingConfig(
        name="small",
        optimizer=OptimizerConfig(learning_rate=2e-3, part_learning_rates={"projector": 5e-3}),
        train=("projector", "language_model"),
        model=ModelConfig(start=str(tiny_model_dir), image_mode="slice", max_tiles=4),
        data=DataConfig(path=str(training_data), max_length=512, num_workers=0),
        batch_size=8,
        device_batch_size=2,
        epochs=5,
        precision="float32",
        checkpointing=False,
        save_every=3,
        report_to=(),
    )


@pytest.fixture(scope="session")
def packed_config(run_config):
    """The same, in packed rows."""
    data = replace(run_config.data, packed=True, max_length=768)
    return replace(run_config, data=data, batch_size=4, device_batch_size=1, epochs=7)


@pytest.fixture(scope="session")
def finished(run_config, tmp_path_factory):
    """The output of a run of 20 steps that nothing disturbed."""
    output = tmp_path_factory.mktemp("finished")
    assert start(Start(run_config.to_dict(), output)) == [0]
    return output
