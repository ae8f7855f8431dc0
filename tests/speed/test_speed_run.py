"""Measuring: what is counted in tensors, forced lengths, what the numbers are made of; never how large a time is."""

import pytest
import torch

from tokenpacker.speed.machine import attention_kernels, describe_machine
from tokenpacker.speed.memory import needed_memory, random_model, require_memory
from tokenpacker.speed.model_sizes import candidates, named_shapes, shapes_of_folder
from tokenpacker.speed.speed_rows import Protocol
from tokenpacker.speed.speed_run import make_projector, measure_rows, spreads
from tokenpacker.speed.stopwatch import Spread, Stopwatch, take_turns

CPU = torch.device("cpu")
CACHED = 2 * 2 * 16 * 4  # bytes of a token: keys and values of 2 layers, 2 heads of 8 numbers in float32


@pytest.fixture(scope="module")
def shapes(tiny_model_dir):
    return shapes_of_folder(tiny_model_dir, "tiny")


def measure(model, shapes, **settings):
    protocol = Protocol(**{"batch_sizes": (1, 2), "rounds": 1, "warm_up": 1, "output_tokens": 4} | settings)
    return measure_rows(model, shapes, candidates(shapes, trained=True), protocol)


@pytest.fixture(scope="module")
def rows(tiny_model, shapes):
    return measure(tiny_model, shapes, image_size=(64, 96), text_tokens=10)


def test_average_pooling_and_all_tokens_stand_beside_what_is_asked_for(rows):
    named = [(row.batch_size, row.candidate.name) for row in rows]
    assert named == [(size, name) for size in (1, 2) for name in ("token-packer", "average-pool", "mlp")]
    assert [row.candidate.trained for row in rows[:3]] == [True, False, False]


def test_tokens_tiles_and_cache_are_counted_in_the_tensors(rows, tiny_processor):
    layout = tiny_processor.image_layout((64, 96))
    for row in rows[0], rows[3]:
        counted = row.counted
        assert counted.tiles == row.batch_size * layout.tile_grid.num_tiles
        assert (counted.tokens_per_tile, counted.image_tokens) == (16, layout.num_tokens)
        assert counted.prompt_tokens == layout.num_tokens + 10
        assert counted.output_tokens == 4
        assert counted.cache_bytes == row.batch_size * counted.prompt_tokens * CACHED
        assert counted.full_cache_bytes == row.batch_size * (counted.prompt_tokens + 3) * CACHED
    assert rows[2].counted.tokens_per_tile == 64


def test_operations_are_those_of_the_whole_batch(rows):
    single, double = rows[0].flops, rows[3].flops
    assert double.first_token == 2 * single.first_token
    assert double.decode == 2 * single.decode > 0


def test_every_part_has_its_time(rows):
    for row in rows:
        assert all(0 < spread.median <= spread.p95 for spread in row.times.values())  # of one round they are the same
        parts = [row.median(part) for part in ("vision", "projector", "prefill")]
        assert row.median("first_token") == pytest.approx(sum(parts))


def test_an_answer_has_its_length_even_where_the_model_would_end_it_at_once(make_tiny_model, shapes):
    model = make_tiny_model()
    torch.nn.init.zeros_(model.lm_head.weight)  # all logits alike: the first id is said again and again
    model.generation_config.eos_token_id = 0
    free = model.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=False)
    assert free.shape[1] == 2 + 1
    assert {row.counted.output_tokens for row in measure(model, shapes, batch_sizes=(1,))} == {4}


def test_answers_of_one_token_leave_nothing_to_divide(tiny_model, shapes):
    row = measure(tiny_model, shapes, batch_sizes=(1,), output_tokens=1)[0]
    assert row.times["per_output_token"] is None
    assert row.times["total"] == row.times["first_token"]
    assert row.counted.full_cache_bytes == row.counted.cache_bytes


def test_progress_is_shown_step_by_step(tiny_model, shapes, monkeypatch, capsys):
    monkeypatch.setattr("tokenpacker.progress.FIRST_LINE_SECONDS", 0)
    monkeypatch.setattr("tokenpacker.progress.LINE_SECONDS", 0)
    protocol = Protocol(batch_sizes=(1,), rounds=2, warm_up=1, output_tokens=2)
    measure_rows(tiny_model, shapes, candidates(shapes), protocol)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 9
    assert lines[0].startswith("speed: 1 of 9 (")
    assert lines[0].endswith("; token-packer, batch 1")


def test_variants_take_turns_and_each_round_starts_with_another():
    assert "".join(take_turns("abc", 3)) == "abcbcacab"


def test_a_stopwatch_keeps_the_mean_of_calls_in_a_row_and_returns_the_result():
    watch, calls = Stopwatch(CPU), []
    assert watch.time("part", lambda: calls.append(0) or len(calls), repeats=4) == 4
    assert watch.time("part", lambda: "result") == "result"
    assert [len(times["part"]) for times in (watch.wall, watch.cpu)] == [2, 2]


def test_per_token_is_what_an_answer_takes_after_its_first_token():
    seconds = {"vision": [1.0], "projector": [0.5], "prefill": [2.0], "answer": [5.0], "decode": [3.0]}
    times = spreads(seconds, output_tokens=4)
    assert times["per_output_token"].median == 1000
    assert times["first_token"].median == 3500
    assert times["total"].median == 6500


def test_a_spread_is_median_and_95th_percentile_in_milliseconds():
    spread = Spread.of([number / 1000 for number in range(101)])
    assert (spread.median, spread.p95) == (pytest.approx(50), pytest.approx(95))
    assert Spread.of([0.002]) == Spread(2, 2)


def test_the_model_s_own_projector_is_measured_and_others_are_made_beside_it(tiny_model, shapes):
    own, pooled, _ = candidates(shapes, trained=True)
    assert make_projector(tiny_model, own) is tiny_model.model.multi_modal_projector
    assert make_projector(tiny_model, pooled).config.language_dim == 32


def test_the_kernel_that_attention_took_is_seen(tiny_model, make_tiny_model):
    assert any("scaled_dot_product" in name for name in attention_kernels(tiny_model))
    eager = make_tiny_model()
    eager.set_attn_implementation("eager")
    assert attention_kernels(eager) == []


def test_the_machine_is_described():
    machine = describe_machine(CPU)
    assert (machine["device"], machine["threads"]) == ("cpu", torch.get_num_threads())
    # a build such as 2.13.0+cu130 may be installed as 2.13.0
    assert machine["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]


@pytest.mark.parametrize("setting", ["text_tokens", "output_tokens", "rounds", "warm_up"])
def test_a_protocol_of_nothing_is_refused(setting):
    with pytest.raises(ValueError, match=f"{setting}=0 must be an integer of at least 1"):
        Protocol(**{setting: 0})


def test_the_weights_that_are_estimated_are_those_that_are_there(tiny_model, shapes):
    asked = candidates(shapes, trained=True)
    modules = [tiny_model, *(make_projector(tiny_model, one) for one in asked[1:])]
    real = sum(weight.nbytes for module in modules for weight in module.parameters())
    assert needed_memory(shapes, asked, Protocol(), "float32").weights == real
    assert needed_memory(shapes, asked, Protocol(), "bfloat16").weights == real / 2


def test_what_does_not_fit_is_refused_before_it_is_made():
    shapes = named_shapes("13b")
    protocol = Protocol(batch_sizes=(1, 100_000))
    message = r"model 13b in float32 at batch 100000 needs about [\d.]+ GiB \(50.2 of weights\) but cpu has .* --plan"
    with pytest.raises(ValueError, match=message):
        require_memory(shapes, candidates(shapes), protocol, "float32", CPU)


def test_random_weights_are_made_in_the_type_that_is_asked_for(tiny_model):
    model = random_model(tiny_model.config.__class__.from_dict(tiny_model.config.to_dict()), torch.bfloat16, CPU)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32
    assert not model.training
