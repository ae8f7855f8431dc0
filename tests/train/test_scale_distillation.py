"""Answers at a larger scale factor learn from those at a smaller one, and nothing else changes."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from tokenpacker.data.batches import IDS, BatchMaker, FileBatches
from tokenpacker.data.sources import look_through
from tokenpacker.hf import TokenPackerConfig, TokenPackerProcessor
from tokenpacker.hub import carried_model_path
from tokenpacker.scenes.steps import Steps, StepSpec
from tokenpacker.train.assemble import assemble
from tokenpacker.train.config import ScenesConfig
from tokenpacker.train.run import train
from tokenpacker.train.run_folder import HISTORY
from tokenpacker.train.scale_distillation import DistillingTrainer, ScaleDistillation
from tokenpacker.train.trainer import PartTrainer, training_arguments
from train_runs import Start, start

STUDENT, TEACHER = 4, 2


@pytest.fixture
def elastic_config(run_config):
    return replace(run_config, scale_factors=(TEACHER, STUDENT), max_steps=4, save_every=2)


def distillation_of(config, model_config, weight=1.0):
    found = ScaleDistillation.of_run(replace(config, scale_distillation=weight), model_config)
    assert found is not None
    return found


def batches_at(config, scale_factor):
    """The batches of a run, with samples laid out for one scale factor; their plan is the same for all."""
    _, processor = assemble(config)
    data = look_through(config, processor, None)
    maker = BatchMaker(data.maker, data.rejects, packed=config.data.packed, scale_factors=(scale_factor,))
    return FileBatches(data.plan, data.records, maker)


def assert_same_batch(made, expected, shown, of_text):
    """What is `of_text` may differ at padding."""
    assert made.keys() == expected.keys()
    for name, value in expected.items():
        if name in of_text:
            assert torch.equal(made[name][shown], value[shown]), name
        elif isinstance(value, torch.Tensor):
            assert torch.equal(made[name], value), name
        else:
            assert made[name] == value, name


@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize(("student", "teacher"), [(STUDENT, TEACHER), (3, 2)])
def test_the_teacher_gets_the_batch_that_its_scale_factor_would_have_given(
    run_config, packed_config, kind, student, teacher
):
    config = replace(packed_config if kind == "packed" else run_config, scale_factors=(teacher, student))
    distillation = distillation_of(config, assemble(config)[0].config)
    of_student, of_teacher = (batches_at(config, factor) for factor in (student, teacher))
    for number in range(6):
        made = distillation.teacher_inputs(of_student[number], teacher)
        expected = of_teacher[number]
        assert_same_batch(made, expected, expected["attention_mask"] == 1, of_text=("input_ids",))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_teacher_gets_the_generated_step_that_its_scale_factor_would_have_given(elastic_config, index):
    config = TokenPackerConfig.from_pretrained(carried_model_path())
    processor = TokenPackerProcessor.from_pretrained(carried_model_path())
    steps = {}
    for factor in (STUDENT, TEACHER):
        spec = StepSpec(show="pixels", captions=0.3, scale_factors=(factor,), paced_at=TEACHER, tokens_per_step=400)
        steps[factor] = Steps(spec, processor.tokenizer, num_steps=10, seed=0, processor=processor)[index]
    made = distillation_of(elastic_config, config).teacher_inputs(steps[STUDENT], TEACHER)
    for batch in (made, steps[TEACHER]):
        batch["attention_mask"] = batch["attention_mask"][:, 0]  # (B, S, S)
    shown = steps[TEACHER]["position_ids"] > 0
    of_text = ("input_ids", "position_ids", "attention_mask")
    assert_same_batch(made, steps[TEACHER], shown, of_text)


class Batches(torch.utils.data.Dataset):
    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, number):
        return self.batches[number]


def trainer_at(config, folder, progress, weight):
    """A trainer after a share of its run, its model and a batch of the student."""
    torch.manual_seed(0)
    model, _ = assemble(config)
    batch = batches_at(config, STUDENT)[0]
    batch.pop(IDS)
    trainer = PartTrainer(
        config,
        model.train(),
        Batches([batch]),
        training_arguments(config, folder, num_workers=0),
        forward_options={"use_cache": False, "only_learned": True},
        distillation=distillation_of(config, model.config, weight) if weight else None,
    )
    trainer.state.max_steps, trainer.state.global_step = 100, round(100 * progress)
    return trainer, model, batch | trainer.forward_options


def gradients(model):
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def test_the_loss_is_the_cross_entropy_and_the_divergence_from_fixed_answers_of_the_teacher(elastic_config, tmp_path):
    """Against a plain computation in which a copy of the model is the teacher: no gradient reaches it."""
    trainer, model, batch = trainer_at(elastic_config, tmp_path, progress=0.25, weight=2.0)
    count = int((batch["labels"][:, 1:] != -100).sum())
    trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(count)).backward()
    found = gradients(model)
    model.zero_grad()
    taught = distillation_of(elastic_config, model.config).teacher_inputs(batch, TEACHER)
    with torch.no_grad():
        teacher = copy.deepcopy(model)(**taught).logits
    answers = model(**batch)
    soft = functional.kl_div(answers.logits.log_softmax(-1), teacher.softmax(-1), reduction="sum") / count
    (answers.loss + 2.0 * 0.5 * soft).backward()  # half of the ramp
    assert float(soft.detach()) > 0
    torch.testing.assert_close(found, gradients(model), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("progress", [0.0, 0.5])
def test_a_step_without_weight_is_a_plain_step_bit_by_bit(elastic_config, tmp_path, progress):
    """At the beginning of the ramp, and for the smallest scale factor at any time."""
    found = []
    for weight in (0.0, 3.0):
        trainer, model, batch = trainer_at(elastic_config, tmp_path / str(weight), progress, weight)
        if progress:
            batch = batches_at(elastic_config, TEACHER)[0] | trainer.forward_options
            batch.pop(IDS)
        loss = trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(7))
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_the_teachers_lead_grows_to_the_smallest_scale_factor(elastic_config):
    config = replace(elastic_config, scale_factors=(6, 2, 4, 3, 3))
    distillation = ScaleDistillation(weight=4.0, num_tokens=dict.fromkeys((2, 3, 4, 6), 1), image_token_id=1)
    assert list(config.scale_factors) != sorted(config.scale_factors)
    assert [distillation.teacher_of(6, progress) for progress in (0.0, 0.3, 0.4, 0.99, 1.0)] == [4, 4, 3, 2, 2]
    assert [distillation.teacher_of(3, progress) for progress in (0.0, 1.0)] == [2, 2]
    assert distillation.teacher_of(2, 0.5) is None
    assert [distillation.weight_at(progress) for progress in (0.0, 0.25, 0.5, 1.0)] == [0.0, 2.0, 4.0, 4.0]


def steps_of(folder: Path):
    return json.loads((folder / HISTORY).read_text())["steps"]


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_logs_the_divergence_and_goes_on_bit_by_bit(elastic_config, packed_config, tmp_path, packed, monkeypatch):
    data = packed_config.data if packed else elastic_config.data
    config = replace(elastic_config, data=data, checkpointing=True, scale_distillation=1.0, log_every=1)
    assert train(config, tmp_path / "whole") is not None
    taught = [entry for entry in steps_of(tmp_path / "whole") if "scale_distillation" in entry]
    assert 0 < len(taught) < 4  # the smaller scale factor has no teacher
    assert taught[-1]["scale_distillation"] > 0

    compute, calls = DistillingTrainer.compute_loss, []

    def stops(self, *arguments, **options):
        calls.append(self)
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return compute(self, *arguments, **options)

    monkeypatch.setattr(DistillingTrainer, "compute_loss", stops)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "stopped")
    monkeypatch.undo()
    assert train(config, tmp_path / "stopped") is not None
    assert steps_of(tmp_path / "stopped") == steps_of(tmp_path / "whole")
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]


def test_what_cannot_be_distilled_is_refused(elastic_config):
    with pytest.raises(ValueError, match="scale_distillation=1 needs two scale_factors"):
        replace(elastic_config, scale_distillation=1.0, scale_factors=(2, 2))
    for other in ({"compile": True}, {"mixed_share": 0.5}):
        with pytest.raises(ValueError, match=f"does not go with {next(iter(other))}"):
            replace(elastic_config, scale_distillation=1.0, **other)
    data = replace(elastic_config.data, path=None, scenes=ScenesConfig(captions=0.5))
    with pytest.raises(ValueError, match=r"data\.scenes\.paced_at=2"):
        replace(elastic_config, scale_distillation=1.0, data=data, batch_size=1, device_batch_size=1)
    mlp = TokenPackerConfig.from_pretrained(carried_model_path())
    mlp.multi_modal_projector_config = {
        "name": "mlp",
        **{key: mlp.projector_config[key] for key in ("vision_dim", "language_dim", "num_levels")},
    }
    with pytest.raises(ValueError, match=r"takes all of scale_factors: scale_factor=2 but the mlp projector"):
        distillation_of(elastic_config, mlp)


@pytest.mark.slow
def test_two_processes_distil_what_one_does(elastic_config, tmp_path):
    """The sums come in another order, so that float32 results agree to 1e-6 and not to a bit."""
    config = replace(elastic_config, scale_distillation=1.0, log_every=1).to_dict()
    for count in (1, 2):
        assert start(Start(config, tmp_path / str(count), num_processes=count)) == [0] * count
    one, two = (steps_of(tmp_path / str(count)) for count in (1, 2))
    for name in ("loss", "scale_distillation"):
        values = [[entry.get(name) for entry in found] for found in (one, two)]
        assert [value is None for value in values[0]] == [value is None for value in values[1]]
        pairs = [[value for value in found if value is not None] for found in values]
        assert pairs[0] == pytest.approx(pairs[1], abs=1e-6)
