"""Measuring: what is counted in tensors, forced lengths, what the numbers are made of; never how large a time is."""

import time

import pytest
import torch

from tokenpacker import projectors
from tokenpacker.speed.machine import attention_kernels, describe_machine
from tokenpacker.speed.memory import needed_memory, random_model, require_memory
from tokenpacker.speed.model_sizes import candidates, named_shapes, shapes_of_folder
from tokenpacker.speed.speed_report import Protocol
from tokenpacker.speed.speed_run import make_projector, measure_rows, summarize
from tokenpacker.speed.stopwatch import Stopwatch, spread, take_turns

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
    named = [(row["batch_size"], row["projector"]) for row in rows]
    assert named == [(size, name) for size in (1, 2) for name in ("token-packer", "average-pool", "mlp")]
    assert [row["trained"] for row in rows[:3]] == [True, False, False]


def test_tokens_tiles_and_cache_are_counted_in_the_tensors(rows, tiny_processor):
    layout = tiny_processor.image_layout((64, 96))
    for row in rows[0], rows[3]:
        counted, batch = row["counted"], row["batch_size"]
        prompt = layout.num_tokens + 10
        assert counted["tiles"] == batch * layout.tile_grid.num_tiles
        assert (counted["tokens_per_tile"], counted["image_tokens"]) == (16, layout.num_tokens)
        assert (counted["prompt_tokens"], counted["output_tokens"]) == (prompt, 4)
        assert counted["cache_bytes"] == batch * prompt * CACHED
        assert counted["full_cache_bytes"] == batch * (prompt + 3) * CACHED
    assert rows[2]["counted"]["tokens_per_tile"] == 64


def test_operations_are_those_of_the_whole_batch(rows):
    single, double = rows[0]["flops"], rows[3]["flops"]
    assert all(double[part] == 2 * single[part] > 0 for part in single)


def test_any_projector_is_measured_and_counted(tiny_model, shapes):
    names = projectors.available()
    asked = candidates(shapes, names, 2)
    rows = measure_rows(tiny_model, shapes, asked, Protocol(batch_sizes=(1,), rounds=1, warm_up=1, output_tokens=1))
    assert [row["projector"] for row in rows] == list(names)
    assert all(row["flops"]["projector"] > 0 for row in rows)


def test_every_part_has_its_time(rows):
    for row in rows:
        times = row["milliseconds"]
        assert all(0 < spread["median"] <= spread["p95"] for spread in times.values())  # one round: they are the same
        parts = [times[part]["median"] for part in ("vision", "projector", "prefill")]
        assert times["first_token"]["median"] == pytest.approx(sum(parts), abs=1e-3)  # each has four decimals


def test_token_packer_is_measured_folded_beside_its_plain_form(rows):
    folded = {row["projector"]: row["folded_projector_milliseconds"] for row in rows}
    assert folded["token-packer"]["median"] > 0
    assert folded["average-pool"] is folded["mlp"] is None


def test_an_answer_has_its_length_even_where_the_model_would_end_it_at_once(make_tiny_model, shapes):
    model = make_tiny_model()
    torch.nn.init.zeros_(model.lm_head.weight)  # all logits alike: the first id is said again and again
    model.generation_config.eos_token_id = 0
    free = model.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=False)
    assert free.shape[1] == 2 + 1
    assert {row["counted"]["output_tokens"] for row in measure(model, shapes, batch_sizes=(1,))} == {4}


def test_answers_of_one_token_leave_nothing_to_divide(tiny_model, shapes):
    row = measure(tiny_model, shapes, batch_sizes=(1,), output_tokens=1)[0]
    assert row["milliseconds"]["per_output_token"] is None
    assert row["milliseconds"]["total"] == row["milliseconds"]["first_token"]
    assert row["counted"]["full_cache_bytes"] == row["counted"]["cache_bytes"]


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


def test_a_stopwatch_keeps_every_time_of_a_part_and_returns_the_result():
    watch = Stopwatch(CPU)
    assert [watch.time("sleep", lambda value=value: (time.sleep(0.01), value)[1]) for value in "ab"] == ["a", "b"]
    assert all(seconds >= 0.01 for seconds in watch.wall["sleep"])
    assert all(seconds < 0.01 for seconds in watch.cpu["sleep"])  # a process that sleeps takes no processor time
    watch.start()
    time.sleep(0.01)
    watch.stop("sleep", calls=10)
    assert watch.wall["sleep"][2] < min(watch.wall["sleep"][:2])


def test_per_token_is_what_an_answer_takes_after_its_first_token():
    seconds = {"vision": [1.0], "projector": [0.5], "prefill": [2.0], "answer": [5.0], "decode": [3.0]}
    times = summarize(seconds, num_output=4)
    medians = [times[part]["median"] for part in ("per_output_token", "first_token", "total")]
    assert medians == [1000, 3500, 6500]


def test_a_spread_is_median_and_95th_percentile_in_milliseconds():
    assert spread([number / 1000 for number in range(101)]) == {"median": 50, "p95": 95}
    assert spread([0.002]) == {"median": 2, "p95": 2}


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
