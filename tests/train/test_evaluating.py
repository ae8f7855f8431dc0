"""Evaluation on the way: what it measures, that the steps do not notice it, which checkpoint is best, an early end."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from tokenpacker.data.collate import collate_padded
from tokenpacker.data.sources import check_source, look_through, open_source
from tokenpacker.hf import TokenPackerForConditionalGeneration
from tokenpacker.train.assemble import load_processor
from tokenpacker.train.config import DataConfig, LoraConfig, ScenesConfig, from_dict
from tokenpacker.train.evaluating import EvaluatingTrainer
from tokenpacker.train.evaluation_config import EvaluationConfig
from tokenpacker.train.preview import describe, preview
from tokenpacker.train.run import check, train
from train_runs import Death, Start, evaluations, history, start


@pytest.fixture(scope="module")
def own_task(training_data):
    """A task of 6 questions; the last one's picture is missing."""
    lines = [{"image": f"{number}-0.png", "question": "what is it?", "answer": "so"} for number in (1, 2, 3, 5, 7)]
    path = training_data.parent / "mine.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, lines[0] | {"image": "none.png"}]))
    return path


@pytest.fixture(scope="module")
def held_out_file(training_data):
    """A file with the first nine rows, as if they were others."""
    path = training_data.parent / "held_out.json"
    path.write_text(json.dumps(json.loads(training_data.read_text())[:9]))
    return path


@pytest.fixture
def config(run_config):
    """A run of 8 steps that holds a fifth out and evaluates after each second one."""
    return replace(
        run_config, max_steps=8, save_every=100, eval_every=2, evaluation=EvaluationConfig(held_out_share=0.2)
    )


@pytest.fixture
def losses(monkeypatch):
    """Losses that the evaluations find, in place of their own: the second is the best."""
    found = [1.0, 0.5, 0.7, 0.9]
    monkeypatch.setattr(
        EvaluatingTrainer, "_held_out_loss", lambda self, held_out: found[self.state.global_step // 2 - 1]
    )
    return found


def told(output):
    return json.loads((output / "history.json").read_text())


def weights(folder):
    return load_file(folder / "model.safetensors")


def same_weights(folder, other):
    found, wanted = weights(folder), weights(other)
    return found.keys() == wanted.keys() and all(found[name].equal(wanted[name]) for name in found)


def test_steps_do_not_notice_an_evaluation(run_config, own_task, held_out_file, tmp_path):
    lora = LoraConfig(rank=4, alpha=8, dropout=0.1)  # draws random numbers in each step
    plain = replace(run_config, train=("projector",), lora=lora, max_steps=2)
    evaluation = EvaluationConfig(held_out=str(held_out_file), tasks=(str(own_task),), limit=2)
    data = replace(run_config.data, num_workers=1)
    train(plain, tmp_path / "plain")
    train(replace(plain, data=data, eval_every=1, evaluation=evaluation), tmp_path / "evaluated")
    histories = told(tmp_path / "plain"), told(tmp_path / "evaluated")
    assert histories[0]["steps"] == histories[1]["steps"]
    assert same_weights(tmp_path / "plain" / "model", tmp_path / "evaluated" / "model")
    assert "evaluations" not in histories[0]
    found = histories[1]["evaluations"]
    assert [entry["step"] for entry in found] == [1, 2]
    assert all({"eval_loss", "eval_mine", "eval_seconds"} < entry.keys() for entry in found)
    assert histories[1]["evaluation"]["questions"] == {"mine": 2}


def test_the_held_out_loss_is_the_mean_over_labelled_tokens(config, tmp_path):
    train(config, tmp_path)
    data = look_through(config, load_processor(config.model), None)
    model = TokenPackerForConditionalGeneration.from_pretrained(tmp_path / "model")
    total = count = 0
    for number in data.held_out:
        sample = data.maker.make(data.records[number])
        batch = collate_padded([sample], 0)
        with torch.no_grad():
            logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        total += float(functional.cross_entropy(logits[0, :-1], sample.labels[1:], reduction="sum"))
        count += int((sample.labels != -100).sum())
    assert told(tmp_path)["evaluations"][-1]["eval_loss"] == pytest.approx(total / count, abs=1e-5)


def test_held_out_rows_are_never_trained_on_and_stay_the_same(config, tmp_path):
    processor = load_processor(config.model)
    sources = [open_source(changed, processor, tmp_path) for changed in (config, replace(config, max_steps=40), config)]
    rows = [source.held_out.facts["rows"] for source in sources]
    assert rows[0] == rows[1] == rows[2]
    assert sources[0].held_out.facts == {"share": 0.2, "samples": 5, "rows": rows[0]}
    planned = [{n for batch in s.batches.plan.batches for row in batch for n in row} for s in sources]
    assert planned[1] == set(range(26)) - set(rows[0])
    measured = [n for batch in sources[0].held_out.batches.plan.batches for row in batch for n in row]
    assert sorted(measured) == rows[0]
    other = open_source(replace(config, seed=1), processor, tmp_path)
    assert other.held_out.facts["rows"] != rows[0]
    shown = preview(config)
    assert (shown.samples["used"], shown.samples["held_out"]) == (21, 5)
    assert "5 more held out" in describe(shown)


def test_the_best_checkpoint_is_kept_and_becomes_the_model_if_asked_for(config, losses, tmp_path, capsys):
    train(config, tmp_path / "last")
    history, checkpoints = told(tmp_path / "last"), tmp_path / "last" / "checkpoints"
    assert [entry["eval_loss"] for entry in history["evaluations"]] == losses
    assert history["evaluation"]["best"] == {"step": 4, "value": 0.5, "checkpoint": "checkpoints/checkpoint-4"}
    assert history["evaluation"]["model"] == {"final": "last", "step": 8}
    assert sorted(folder.name for folder in checkpoints.iterdir()) == ["checkpoint-4", "checkpoint-8"]
    assert same_weights(tmp_path / "last" / "model", checkpoints / "checkpoint-8")
    assert "step 6: loss 0.7000 (best: loss 0.5000 at step 4)\n" in capsys.readouterr().err
    best = replace(config, evaluation=replace(config.evaluation, final="best"))
    train(best, tmp_path / "best")
    assert same_weights(tmp_path / "best" / "model", checkpoints / "checkpoint-4")
    assert told(tmp_path / "best")["evaluation"]["model"] == {"final": "best", "step": 4}
    assert told(tmp_path / "best")["steps"] == history["steps"]
    card = (tmp_path / "best" / "model" / "README.md").read_text()
    assert "| best evaluation | loss 0.5000 at step 4 |" in card
    assert "| this model | step 4, the best |" in card


def test_the_best_lora_run_has_the_weights_of_its_best_step(config, losses, tmp_path):
    lora = replace(config, train=("projector",), lora=LoraConfig(rank=4, alpha=8))
    train(replace(lora, evaluation=replace(lora.evaluation, final="best")), tmp_path / "best")
    train(lora, tmp_path / "last")
    adapters = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("best", "last")]
    kept = load_file(tmp_path / "best" / "checkpoints" / "checkpoint-4" / "adapter_model.safetensors")
    assert all(kept[name].equal(adapters[0][name]) for name in kept)
    assert not all(kept[name].equal(adapters[1][name]) for name in kept)
    assert not same_weights(tmp_path / "best" / "model", tmp_path / "last" / "model")


def test_a_run_ends_when_patience_does_and_goes_on_with_more(config, losses, tmp_path, capsys):
    patient = replace(config, max_steps=40, evaluation=replace(config.evaluation, patience=1))
    model = train(patient, tmp_path)
    assert "no new best in 1 evaluations, so the run ends here" in capsys.readouterr().err
    history = told(tmp_path)
    assert (history["evaluation"]["stopped_early"], len(history["steps"])) == (True, 6)
    assert "stopped early at step 6" in (model / "README.md").read_text()
    before = (model / "model.safetensors").read_bytes()
    train(patient, tmp_path)
    assert "finished before" in capsys.readouterr().err
    shutil.rmtree(model)  # as if it had been killed before the model was written
    (tmp_path / "history.json").unlink()
    train(patient, tmp_path)
    assert (model / "model.safetensors").read_bytes() == before
    assert told(tmp_path)["steps"] == history["steps"]
    train(replace(patient, evaluation=replace(patient.evaluation, patience=2)), tmp_path)
    assert len(told(tmp_path)["steps"]) == 8
    whole = tmp_path / "whole"
    train(replace(patient, evaluation=replace(patient.evaluation, patience=2)), whole)
    assert told(whole)["steps"] == told(tmp_path)["steps"]


def test_a_task_may_decide_and_is_drawn_in_tensorboard(config, own_task, monkeypatch, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from tokenpacker.train.task_scores import TaskScore

    monkeypatch.setattr(
        TaskScore, "measure", lambda self, model, processor, **share: 50.0 + self.questions[0].text.count("?")
    )
    evaluation = replace(config.evaluation, tasks=(str(own_task),), metric="relaxed", best_by="mine")
    train(replace(config, max_steps=3, evaluation=evaluation, report_to=("tensorboard",)), tmp_path)
    assert told(tmp_path)["evaluation"]["best"]["step"] == 2  # the first of equals; the last step was measured, too
    assert [entry["step"] for entry in told(tmp_path)["evaluations"]] == [2, 3]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [point.value for point in events.Scalars("eval/mine")] == [51.0, 51.0]
    assert [point.step for point in events.Scalars("eval/loss")] == [2, 3]
    assert "train/loss" in events.Tags()["scalars"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"evaluation": {"limit": 3}}, "eval_every is missing"),
        ({"eval_every": 5}, "eval_every=5 has nothing to measure"),
        ({"eval_every": 5, "evaluation": {"held_out": "a.json", "held_out_share": 0.1}}, "exclude each other"),
        ({"eval_every": 5, "evaluation": {"held_out_share": 1.0}}, "held_out_share=1.0 must be less than 1"),
        ({"eval_every": 5, "evaluation": {"tasks": ["a/x.jsonl", "b/x.jsonl"]}}, "must all have other names"),
        ({"eval_every": 5, "evaluation": {"tasks": ["fine-print"], "metric": "vqa"}}, "belongs to your own tasks"),
        ({"eval_every": 5, "evaluation": {"tasks": ["fine-print"], "best_by": "loss"}}, "use one of: fine-print"),
        ({"eval_every": 5, "evaluation": {"patience": 0, "tasks": ["fine-print"]}}, "patience=0"),
        ({"eval_every": 5, "evaluation": {"pace": 1}}, "did you mean evaluation.patience"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(run_config, settings, message):
    with pytest.raises(ValueError, match=message):
        from_dict(run_config.to_dict() | settings)


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"tasks": ("fine-prin",)}, "did you mean fine-print"),
        ({"tasks": ("pope",)}, "pope is a benchmark"),
        ({"tasks": ("none.jsonl",)}, "none.jsonl does not exist"),
        ({"held_out": "none.json"}, "evaluation.held_out: data file none.json does not exist"),
        ({"held_out": "shards/0.tar"}, "holds tar shards"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_loaded(run_config, evaluation, message):
    with pytest.raises(ValueError, match=message):
        check(replace(run_config, eval_every=5, evaluation=EvaluationConfig(**evaluation)))


def test_data_without_numbers_have_no_share_to_hold_out_but_may_have_a_file(run_config, held_out_file, tmp_path):
    shared = EvaluationConfig(held_out_share=0.1)
    stream = replace(run_config, data=replace(run_config.data, path="shards/0.tar"), max_steps=3)
    with pytest.raises(ValueError, match=r"a stream has none; give evaluation\.held_out=FILE"):
        check_source(replace(stream, data=replace(stream.data, format="hub"), eval_every=1, evaluation=shared))
    scenes = replace(
        run_config,
        data=DataConfig(scenes=ScenesConfig(captions=0.2)),
        scale_factors=(2, 3),
        batch_size=1,
        device_batch_size=1,
        max_steps=3,
    )
    with pytest.raises(ValueError, match=r"generated scenes have none; give evaluation\.held_out=FILE"):
        check_source(replace(scenes, eval_every=1, evaluation=shared))
    check_source(replace(scenes, eval_every=1, evaluation=EvaluationConfig(held_out=str(held_out_file))))
    with pytest.raises(ValueError, match="which is trained on; give another file"):
        check_source(replace(run_config, eval_every=1, evaluation=EvaluationConfig(held_out=str(run_config.data.path))))
    few = EvaluationConfig(held_out_share=0.99)
    with pytest.raises(ValueError, match=r"leaves none of 26 usable samples"):
        look_through(replace(run_config, eval_every=1, evaluation=few), load_processor(run_config.model), None)


def test_tasks_are_refused_where_the_model_is_divided(run_config, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="which DEEPSPEED may divide"):
        check(replace(run_config, eval_every=5, evaluation=EvaluationConfig(tasks=("fine-print",))))


def test_a_task_about_masks_needs_a_model_that_takes_them(config, tmp_path):
    with pytest.raises(ValueError, match="regions asks about masks"):
        train(replace(config, evaluation=EvaluationConfig(tasks=("regions",), limit=2)), tmp_path)


KILLED = -signal.SIGKILL


@pytest.mark.slow
def test_a_run_that_is_killed_in_evaluations_and_saving_ends_as_one_that_is_not(config, own_task, tmp_path):
    lasting = replace(config.evaluation, tasks=(str(own_task),), limit=2, patience=1, final="best")
    hot = replace(config.optimizer, learning_rate=3e-2, min_learning_rate_share=1.0)  # the loss rises soon
    run = replace(config, max_steps=40, save_every=3, optimizer=hot, evaluation=lasting).to_dict()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(Start(run, whole)) == [0]
    for death in (Death("evaluation", 1), Death("file", 30), Death("evaluation", 2, 0.02)):
        assert start(Start(run, killed, death=death)) == [KILLED]
    assert start(Start(run, killed)) == [0]
    assert json.loads((whole / "history.json").read_text())["evaluation"]["stopped_early"]
    assert len(evaluations(whole)) >= 3
    assert evaluations(killed) == evaluations(whole)
    assert history(killed) == history(whole)
    assert same_weights(killed / "model", whole / "model")
    assert told(killed)["evaluation"] == told(whole)["evaluation"]


@pytest.mark.slow
def test_two_processes_measure_what_one_does(config, own_task, tmp_path):
    evaluation = replace(config.evaluation, tasks=(str(own_task),), best_by="mine", final="best")
    run = replace(config, max_steps=4, evaluation=evaluation)
    train(run, tmp_path / "one")
    assert start(Start(run.to_dict(), tmp_path / "two", num_processes=2)) == [0, 0]
    for one, two in zip(evaluations(tmp_path / "one"), evaluations(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, abs=1e-6)
    assert told(tmp_path / "one")["evaluation"]["best"]["step"] == told(tmp_path / "two")["evaluation"]["best"]["step"]
