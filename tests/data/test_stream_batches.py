from __future__ import annotations

import io
import json
import pickle
import random
import warnings
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader

from tar_shards import write_tar
from tokenpacker.data.batches import IDS, POSITION, BatchMaker, StreamBatches, only_item
from tokenpacker.data.plan import Planner
from tokenpacker.data.rejects import Rejects, TooManyRejects
from tokenpacker.data.rows import Record, RecordError
from tokenpacker.data.samples import SampleMaker
from tokenpacker.data.streams import Stream, open_shards
from tokenpacker.train.assemble import load_processor

SHARDS, PER_SHARD, BUFFER = 3, 9, 8  # an epoch is 27 samples: buffers of 8, 8, 8 and 3
SIZES = ((), ((32, 32),), ((32, 90),), ((70, 64), (32, 32)))  # of a sample's images: none, one tile, a grid, two


@pytest.fixture(scope="module")
def shards(tmp_path_factory, image_of):
    pytest.importorskip("webdataset")
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(SHARDS):
        files = {}
        for number in range(PER_SHARD):
            sizes = SIZES[number % len(SIZES)]
            files |= {f"s{shard}{number}.{place}.png": png(image_of(*size)) for place, size in enumerate(sizes)}
            files[f"s{shard}{number}.json"] = talk(len(sizes), "so " * number + "yes")
        write_tar(folder / f"{shard}.tar", files)
    return folder


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def talk(num_images=0, answer="yes"):
    messages = [{"from": "human", "value": "<image>\n" * num_images + "what?"}, {"from": "gpt", "value": answer}]
    return json.dumps({"conversations": messages}).encode()


@pytest.fixture(scope="module")
def processor(run_config):
    return load_processor(run_config.model)


@pytest.fixture(scope="module", params=["padded", "packed"])
def config(request, run_config, packed_config):
    """Two device batches make a step; a packed row holds few samples."""
    if request.param == "padded":
        return replace(run_config, batch_size=4, device_batch_size=2)
    return replace(packed_config, batch_size=2, device_batch_size=1, data=replace(packed_config.data, max_length=512))


def batches_of(stream, processor, config, start=None, *, num_batches=60, file=None, share=0.0, **options):
    data, seed = config.data, config.seed
    maker = SampleMaker(processor, "v1", data.max_length, max_tiles=data.max_tiles_per_batch)
    rejects = Rejects(file, share)
    factors = {"scale_factors": config.scale_factors, "mixed_share": config.mixed_share}
    maker = BatchMaker(maker, rejects, packed=data.packed, seed=seed, **factors)
    planner = Planner(
        rows=config.device_batch_size,
        max_length=data.max_length,
        max_tiles=data.max_tiles_per_batch,
        batches_per_step=2,
        packed=data.packed,
        grouped=data.grouped,
        seed=seed,
    )
    return StreamBatches(stream, maker, planner, num_batches, start, **{"buffer_size": BUFFER, **options})


@pytest.fixture
def make(shards, processor, config):
    """Makes the batches anew, as another process does: `make(start=None)`."""
    return lambda start=None, **options: batches_of(open_shards(shards), processor, config, start, **options)


@pytest.fixture(scope="module")
def expected(shards, processor, config):
    """The batches in their order; more than two epochs of them."""
    batches = batches_of(open_shards(shards), processor, config)
    return [batches[index] for index in range(len(batches))]


def assert_same(batch, other):
    """Bit-equal: the same code made both."""
    assert batch.keys() == other.keys()
    for key, value in batch.items():
        assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key], key


def epoch_of(batch):
    return batch[POSITION]["epoch"]


def ids_of_epoch(batches, epoch):
    return [id for batch in batches if epoch_of(batch) == epoch for id in batch[IDS]]


def test_a_batch_is_the_same_in_whatever_order_it_is_asked_for(make, expected):
    order = random.Random(0).sample(range(60), 12)
    batches = make()
    for index in [*order, 59, 0]:
        assert_same(batches[index], expected[index])


@pytest.mark.parametrize(("first", "gap"), [(0, 3), (1, 8), (5, 20)])
def test_a_rank_that_takes_every_so_many_batches_gets_the_same_ones(make, expected, first, gap):
    batches = make()
    for index in range(first, 60, gap):
        assert_same(batches[index], expected[index])


def test_worker_processes_make_the_same_batches(make, expected):
    batches = make()
    for batch, other in zip(DataLoader(batches, num_workers=2, collate_fn=only_item), expected, strict=True):
        assert_same(batch, other)


class FileShard:
    """Text samples, two bytes of a file each; a read moves the place of all who share the open file."""

    name = identity = "file"

    def __init__(self, path):
        self.path = path
        path.write_text("".join(f"{number:02}" for number in range(60)))

    def read(self, start):
        with self.path.open("rb", buffering=0) as file:
            file.seek(2 * start)
            while number := file.read(2):
                yield text_record(f"n{number.decode()}")


def text_record(id):
    return Record(id=id, conversation=tuple(json.loads(talk())["conversations"]))


def test_worker_processes_do_not_go_on_reading_what_was_open_before(processor, config, tmp_path):
    make = lambda: batches_of(Stream([FileShard(tmp_path / "x")]), processor, config, num_batches=12)  # noqa: E731
    batches, other = make(), make()
    batches[0]
    loader = DataLoader(batches, num_workers=2, multiprocessing_context="fork", collate_fn=only_item)
    for index, batch in enumerate(loader):
        assert_same(batch, other[index])
        assert_same(batches[index], other[index])


def test_a_copy_that_is_sent_to_another_process_reads_for_itself(make, expected):
    batches = make()
    batches[12]
    copy = pickle.loads(pickle.dumps(batches))  # as spawned workers get it
    assert_same(copy[2], expected[2])
    assert_same(batches[13], expected[13])


def test_every_sample_comes_once_in_each_epoch_and_each_has_its_own_order(expected):
    first, second = (ids_of_epoch(expected, epoch) for epoch in (0, 1))
    everything = sorted(f"s{shard}{number}" for shard in range(SHARDS) for number in range(PER_SHARD))
    assert sorted(first) == sorted(second) == everything
    assert first != second


def test_samples_of_one_shard_have_another_order_in_each_epoch_too(processor, config):
    batches = batches_of(Stream([CountingShard(BUFFER)]), processor, config)
    found = [batches[index] for index in range(60)]
    assert sorted(ids_of_epoch(found, 0)) == sorted(ids_of_epoch(found, 1))
    assert len({tuple(ids_of_epoch(found, epoch)) for epoch in range(4)}) > 1


def test_the_seed_decides_which_samples_share_a_batch(make, expected, shards, processor, config):
    other = batches_of(open_shards(shards), processor, replace(config, seed=config.seed + 1))
    assert [other[index][IDS] for index in range(8)] != [batch[IDS] for batch in expected[:8]]


def test_no_batch_is_larger_than_the_config_allows(expected, config):
    for batch in expected:
        if config.data.packed:
            assert batch["input_ids"].shape[1] <= config.data.max_length
        else:
            assert len(batch["input_ids"]) <= config.device_batch_size


def test_a_reader_goes_on_from_the_position_of_any_batch_as_if_never_stopped(make, expected):
    positions = {batch[POSITION]["batch"]: (index, batch[POSITION]) for index, batch in enumerate(expected)}
    assert len(positions) > 8
    for first, (last, position) in positions.items():
        batches = make(json.loads(json.dumps(position)))
        for index in {first, last, min(last + 1, 59), min(last + 9, 59)}:
            assert_same(batches[index], expected[index])


def test_what_lies_before_the_start_cannot_be_had(make, expected):
    start = next(batch[POSITION] for batch in expected if batch[POSITION]["buffer"] == 1)
    batches = make(start)
    with pytest.raises(ValueError, match=f"batch 0 lies before start=.*ask for batch {start['batch']}"):
        batches[0]
    assert_same(batches[start["batch"]], expected[start["batch"]])


@pytest.mark.parametrize(
    "change", [{"buffer": None}, {"batch": -1}, {"batch": "3"}, {"stream": "x"}, {"shard": 9}], ids=str
)
def test_a_start_of_something_else_is_refused_before_anything_is_read(make, expected, change):
    with pytest.raises(ValueError, match=r"(start|position)=.*(use one|same data)"):
        make(expected[0][POSITION] | change)


def test_an_index_outside_the_run_is_an_index_error(make):
    batches = make(num_batches=5)
    assert len(batches) == 5
    for index in (5, -1):
        with pytest.raises(IndexError):
            batches[index]


def test_batches_of_a_step_have_one_scale_factor(shards, processor, config):
    batches = batches_of(open_shards(shards), processor, replace(config, scale_factors=(2, 4)))
    factors = [batches[index]["scale_factor"] for index in range(12)]
    assert factors[0::2] == factors[1::2]
    assert set(factors) == {2, 4}


def test_tiles_of_a_mixed_step_draw_their_own_scale_factors(shards, processor, config):
    maker = {"scale_factors": (2, 4), "mixed_share": 0.5}
    batches = batches_of(open_shards(shards), processor, replace(config, **maker))
    made = [batches[index] for index in range(12)]
    assert {"scale_factors" in batch for batch in made[0::2]} == {True, False}
    for first, second in zip(made[0::2], made[1::2], strict=True):
        assert ("scale_factors" in first) == ("scale_factors" in second)  # of one step
    for batch in made:
        factors = batch.get("scale_factors", torch.full_like(batch["tile_index"], batch.get("scale_factor", 0)))
        rows, cols = processor.patch_grid
        packed = sum(-(-rows // factor) * -(-cols // factor) for factor in factors.tolist())
        assert int((batch["input_ids"] == processor.image_token_id).sum()) == packed
    mixed = [batch["scale_factors"] for batch in made if "scale_factors" in batch]
    assert any(len(set(factors.tolist())) == 2 for factors in mixed)
    again = batches_of(open_shards(shards), processor, replace(config, **maker))
    assert all(torch.equal(again[index]["input_ids"], batch["input_ids"]) for index, batch in enumerate(made))


class CountingShard:
    """Text samples without an end in sight, of which it knows how many somebody still holds."""

    name = identity = "counting"

    def __init__(self, num_samples, bad=()):
        self.num_samples, self.bad = num_samples, set(bad)
        self.num_read, self.most_alive, self.alive = 0, 0, []

    def read(self, start):
        for number in range(start, self.num_samples):
            self.num_read = number + 1
            if number in self.bad:
                yield RecordError(f"n{number}", "broken", source=f"counting, sample {number + 1}")
                continue
            record = text_record(f"n{number}")
            self.alive = [reference for reference in self.alive if reference() is not None] + [weakref.ref(record)]
            self.most_alive = max(self.most_alive, len(self.alive))
            yield record


def test_no_more_than_a_buffer_is_held_or_read_ahead(processor, config):
    shard = CountingShard(40 * BUFFER)
    batches = batches_of(Stream([shard]), processor, config, num_batches=100)
    for index in range(0, 100, 7):
        position = batches[index][POSITION]
        assert shard.num_read == position["sample"] + BUFFER
    assert shard.num_read > 5 * BUFFER
    assert shard.most_alive <= BUFFER + 1  # the one that is being read


def test_batches_that_are_passed_over_are_not_decoded(make):
    batches = make()
    batch = batches[30]
    assert batches.maker.rejects.num_seen == len(batch[IDS])


def test_bad_samples_are_written_down_once_however_many_processes_and_epochs_read_them(
    tmp_path, processor, config, monkeypatch
):
    bad, file = {f"n{number}" for number in (0, 5, 20)}, tmp_path / "rejects.jsonl"

    def read_all():
        stream = Stream([CountingShard(27, bad=(0, 5, 20))])
        batches = batches_of(stream, processor, config, num_batches=40, file=file, share=0.2)
        found = list(DataLoader(batches, num_workers=2, collate_fn=only_item))
        assert epoch_of(found[-1]) > 1
        return [batch[IDS] for batch in found]

    monkeypatch.setenv("RANK", "1")
    without = read_all()
    assert not file.exists()
    monkeypatch.setenv("RANK", "0")
    assert read_all() == without
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert Counter(row["id"] for row in rows) == Counter(bad)
    assert {row["source"] for row in rows} == {"counting, sample 1", "counting, sample 6", "counting, sample 21"}


def test_an_epoch_with_too_many_bad_samples_ends_the_run_before_its_last_batches(processor, config):
    stream = Stream([CountingShard(27, bad=(3, 26))])
    batches = batches_of(stream, processor, config, share=0.05)
    found = []
    with pytest.raises(TooManyRejects, match="2 of 27 samples"):
        found.extend(id for index in range(60) for id in batches[index][IDS])
    assert sorted(found) == sorted(f"n{number}" for number in range(24) if number != 3)
    assert batches_of(stream, processor, config, share=0.08)[59]


def test_a_run_that_goes_on_near_the_end_of_an_epoch_is_not_judged_by_its_rest(processor, config):
    stream = Stream([CountingShard(27, bad=(26,))])
    whole = batches_of(stream, processor, config, share=0.05)
    last = next(batch[POSITION] for batch in map(whole.__getitem__, range(60)) if batch[POSITION]["sample"] == 24)
    assert_same(batches_of(stream, processor, config, last, share=0.05)[last["batch"]], whole[last["batch"]])


@pytest.mark.parametrize("num_samples", [0, BUFFER, BUFFER + 3])
def test_data_of_which_no_sample_can_be_used_are_an_error_and_no_endless_loop(processor, config, num_samples):
    shard = CountingShard(num_samples, bad=range(num_samples))
    with pytest.raises(ValueError, match="no sample of the data can be used"):
        batches_of(Stream([shard]), processor, config, share=1.0)[0]


def test_a_buffer_without_a_usable_sample_is_passed_over(processor, config):
    stream = Stream([CountingShard(3 * BUFFER, bad=range(BUFFER, 2 * BUFFER))])
    batches = batches_of(stream, processor, config, share=1.0)
    found = [batches[index] for index in range(60)]
    first_epoch = [batch for batch in found if epoch_of(batch) == 0]
    assert [batch[POSITION]["batch"] for batch in found] == sorted(batch[POSITION]["batch"] for batch in found)
    assert {batch[POSITION]["buffer"] for batch in first_epoch} == {0, 2}
    assert len(ids_of_epoch(found, 0)) == 2 * BUFFER
    start = next(batch[POSITION] for batch in found if batch[POSITION]["buffer"] == 2)
    assert_same(batches_of(stream, processor, config, start, share=1.0)[start["batch"]], found[start["batch"]])


def test_a_sample_with_more_tiles_than_a_batch_may_hold_is_rejected(shards, processor, config, tmp_path):
    config = replace(config, data=replace(config.data, max_tiles_per_batch=2))
    file = tmp_path / "rejects.jsonl"
    batches = batches_of(open_shards(shards), processor, config, file=file, share=1.0)
    ids = ids_of_epoch([batches[index] for index in range(60)], 0)
    assert ids
    assert {id[-1] for id in ids} <= set("01458")  # text and one tile
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert all("tiles, more than max_tiles_per_batch=2; raise it" in row["reason"] for row in rows)
    assert len(rows) + len(ids) == SHARDS * PER_SHARD


def test_a_damaged_shard_is_told_aloud(processor, config, tmp_path, monkeypatch):
    path = write_tar(tmp_path / "x.tar", {f"{number}.json": talk() for number in range(6)})
    path.write_bytes(path.read_bytes()[:3000])
    stream = open_shards(path)
    with pytest.warns(UserWarning, match=r"DAMAGED SHARD: .*x\.tar, after sample \d: .*fetch it again"):
        assert batches_of(stream, processor, config, share=1.0)[0][IDS]
    monkeypatch.setenv("RANK", "3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one process says it, not each
        assert batches_of(stream, processor, config)[0][IDS]
