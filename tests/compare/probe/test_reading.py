from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tokenpacker.compare.probe.contract import NO_ANSWER, grid_centers
from tokenpacker.compare.probe.encoders import encode
from tokenpacker.compare.probe.probe_plan import blank_features
from tokenpacker.compare.probe.reading import (
    BATCH,
    DIM,
    Learner,
    Reader,
    by_sort,
    learning_rate,
    order_of,
    read,
    share_right,
)


def test_a_projector_and_a_reader_learn_to_answer(small_probe, tmp_path):
    probe = small_probe()
    encoded = encode(probe.material, probe.frozen, {"train": 128, "test": 64}, tmp_path)
    (run,) = probe.runs
    seen = []
    measured = read(run.config, probe.material.num_classes, *encoded.values(), steps=60, seed=0, seen=seen.append)
    assert measured["accuracy"] > 0.6  # guessing gets 0.38
    assert [step for step, _ in measured["curve"]] == [8, 15, 22, 30, 45, 60]
    assert measured["curve"][-1] == [60, measured["accuracy"]]
    assert measured["curve"][0][1] < measured["accuracy"]
    assert seen == list(range(1, 61))
    assert min(measured["step_ms"], measured["seconds"], measured["parameters"]) > 0


def test_a_seed_decides_the_result(small_probe, tmp_path):
    probe = small_probe()
    encoded = encode(probe.material, probe.frozen, {"train": 32, "test": 16}, tmp_path)
    (run,) = probe.runs
    losses = [
        read(run.config, probe.material.num_classes, *encoded.values(), steps=3, seed=seed)["loss"]
        for seed in (5, 5, 6)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_building_a_learner_leaves_the_callers_random_numbers_alone(small_probe):
    (run,) = small_probe().runs
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    Learner(run.config, (5, 5), (3,), steps=4, seed=0)
    assert torch.equal(torch.rand(1), expected)


def test_a_class_that_a_question_does_not_have_is_never_its_answer():
    answers = Reader((2, 2), (2, 5))(torch.randn(3, 4, 128)).softmax(dim=-1)  # (N, Q, K)
    assert answers.shape == (3, 2, 5)
    assert (answers[:, 0, 2:] == 0).all()
    assert (answers[:, 1] > 0).all()


def test_a_question_looks_first_at_the_token_in_its_place():
    places = grid_centers(3, 3)
    reader = Reader((3, 3), (2,) * 9, places)
    looks = F.layer_norm(reader.queries, (DIM,)) @ reader.places.T  # (Q, T), as the first attention begins
    assert looks.argmax(dim=1).tolist() == list(range(9))


def test_a_question_about_the_whole_picture_begins_at_random():
    torch.manual_seed(0)
    queries = Reader((2, 2), (2, 2), np.array([[0.5, 0.5], [np.nan, np.nan]])).queries
    assert queries[0].abs().max() > 0.9
    assert 0 < queries[1].abs().max() < 0.2


def test_a_question_without_an_answer_is_neither_learned_nor_counted(small_probe):
    (run,) = small_probe().runs
    learner = Learner(run.config, (5, 5), (2, 2), steps=4, seed=0)
    features = blank_features(run.config, (5, 5), 2)
    with_answer = learner.reader(learner.projector(features)).detach()
    targets = torch.tensor([[1, NO_ANSWER], [NO_ANSWER, NO_ANSWER]])
    assert learner.learn(features, targets) == pytest.approx(-with_answer[0, 0].log_softmax(dim=-1)[1].item(), rel=1e-5)


def test_accuracy_is_told_for_each_sort_of_question():
    targets = torch.tensor([[1, 2, 0], [0, NO_ANSWER, NO_ANSWER]])
    answers = torch.tensor([[1, 0, 0], [2, 0, 0]])
    assert by_sort(answers, targets, {"color": 2, "red": 1}) == {"color": 1 / 3, "red": 1.0}
    assert share_right(answers, targets) == 0.5


def test_every_picture_is_seen_once_before_one_is_seen_again():
    order = order_of(40, steps=6, seed=0)
    assert {len(rows) for rows in order} == {BATCH}
    rows = torch.cat(order).tolist()
    assert sorted(rows[:40]) == sorted(rows[40:80]) == list(range(40))
    assert rows[:40] != rows[40:80]


def test_the_learning_rate_warms_up_and_ends_at_nothing():
    rates = [learning_rate(step, 400) for step in range(401)]
    assert rates[0] == pytest.approx(1 / 50)
    assert max(rates) == rates[50] == 1
    assert rates[225] == pytest.approx(0.5)
    assert rates[400] == pytest.approx(0)
    assert rates[:51] == sorted(rates[:51])
