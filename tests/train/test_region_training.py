"""Rows with regions, from the file to a trained model: one path for all samples, with regions and without."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from golden_pictures import synthetic
from golden_regions import drawn
from tar_shards import write_tar
from tokenpacker.data.batches import IDS
from tokenpacker.data.check import check_data, describe, draw_record
from tokenpacker.data.collate import collate_packed, collate_padded
from tokenpacker.data.records import open_records
from tokenpacker.data.rows import Record, RecordError, read_row
from tokenpacker.data.samples import SampleMaker
from tokenpacker.data.sources import open_source
from tokenpacker.data.streams import open_shards
from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor
from tokenpacker.hf.processing.image_processor import RELEASED_OPTIONS, TokenPackerImageProcessor
from tokenpacker.hf.processing.llama_tokenizer import load_llama_tokenizer
from tokenpacker.sequence import IGNORED
from tokenpacker.train.assemble import assemble, load_processor, parts_of
from tokenpacker.train.config import LoraConfig, ModelConfig
from tokenpacker.train.optimizer import part_of
from tokenpacker.train.preview import preview
from tokenpacker.train.run import train
from train_runs import Start, history, start

BOX, POLYGON = {"box": [5, 8, 50, 30]}, {"polygon": [[60, 5, 85, 5, 70, 30]]}
RLE = {"rle": {"counts": [100, 60, 40 * 90 - 160], "size": [40, 90]}}


def talk(*texts):
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]


def row(id, *texts, **values):
    return {"id": id, "conversations": talk(*texts), **values}


ROWS = [
    row("box", "<image>\nwhat is <mask>?", "it is left", image="wide.png", regions=[[BOX]]),
    row("two", "<image>\nis <mask> near <mask>?", "no", image="wide.png", regions=[[POLYGON, RLE]]),
    row("later", "<image>\nwhat?", "a", "and <mask>?", "its left", image="wide.png", regions=[[BOX]]),
    row("file", "<image>\nwhat is <mask>?", "it is small", image="small.png", regions=[[{"mask": "mask.png"}]]),
    row(
        "both",
        "<image> <mask> <image> <mask>?",
        "a",
        image=["small.png", "wide.png"],
        regions=[[{"box": [1, 2, 9, 9]}], [RLE]],
    ),
    row("second", "<image> <image> <mask>?", "a", image=["small.png", "wide.png"], regions=[None, [BOX]]),
    row("none", "<image>\nwhat?", "it is left", image="wide.png"),
    row("text", "what is 2?", "it is 2"),
]


@pytest.fixture(scope="session")
def region_data(tmp_path_factory, image_of):
    """A file of rows of every kind; pictures and a mask lie beside it."""
    folder = tmp_path_factory.mktemp("region-data")
    image_of(40, 90, seed=1).save(folder / "wide.png")
    image_of(32, 32, seed=2).save(folder / "small.png")
    mask = np.zeros((32, 32), dtype=bool)
    mask[4:20, 10:25] = True
    Image.fromarray(mask).save(folder / "mask.png")
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return folder / "data.jsonl"


@pytest.fixture(scope="session")
def region_config(run_config, region_data):
    """The first region stage on a tiny model that knows no regions yet."""
    data = replace(run_config.data, path=str(region_data))
    return replace(
        run_config, name="regions", train=("regions",), data=data, batch_size=4, device_batch_size=2, epochs=4
    )


@pytest.fixture(scope="session")
def processor(tiny_model_dir):
    return load_processor(ModelConfig(start=str(tiny_model_dir), image_mode="slice", max_tiles=4), with_regions=True)


@pytest.fixture
def maker(processor):
    return SampleMaker(processor)


@pytest.fixture
def samples(maker, region_data):
    """The sample of each row, by its id."""
    records = open_records(region_data)
    return {record.id: maker.make(record) for record in (records[number] for number in range(len(records)))}


def reject(maker, region_data, **changes):
    """Why the first row cannot be used when some of it is changed."""
    with pytest.raises(RecordError) as caught:
        maker.length(read_row(ROWS[0] | changes, region_data.parent, "row"))
    return caught.value


def test_a_sample_has_the_regions_that_the_processor_makes_of_its_prompt(samples, processor, region_data):
    picture = Image.open(region_data.parent / "wide.png")
    prompt = processor.tokenizer.decode(samples["two"].input_ids).replace("<image>", "")
    prompt = prompt.replace("<mask>", "<image><mask>", 1)  # wherever: only regions are compared
    expected = processor(images=picture, text=prompt, region_masks=[[POLYGON, RLE]], return_tensors="pt")
    assert torch.equal(samples["two"].region_cells, expected["region_cells"])
    assert torch.equal(samples["two"].region_first_tile, expected["region_first_tile"])


def test_each_mark_is_one_token_of_which_nothing_is_learned(samples, processor):
    for id, count in {"box": 1, "two": 2, "later": 1, "file": 1, "both": 2, "second": 1, "none": 0, "text": 0}.items():
        marks = samples[id].input_ids == processor.region_token_id
        assert int(marks.sum()) == count == len(samples[id].region_cells) == len(samples[id].region_first_tile)
        assert set(samples[id].labels[marks].tolist()) <= {IGNORED}


def test_a_region_of_the_second_image_begins_behind_the_first_ones_tiles(samples):
    first, second = samples["both"].tile_grids
    assert samples["both"].region_first_tile.tolist() == [0, first.num_tiles]
    assert samples["second"].region_first_tile.tolist() == [first.num_tiles]
    assert samples["both"].region_cells.shape[1] == max(first.num_tiles, second.num_tiles)


def test_the_tokens_of_regions_are_counted_with_the_text(maker, region_data, samples):
    records = open_records(region_data)
    for number in range(len(records)):
        length = maker.length(records[number])
        sample = samples[records[number].id]
        assert (length.tokens, length.regions) == (len(sample.input_ids), len(sample.region_cells))


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_gives_every_region_the_token_that_its_sample_gives_it_alone(region_config, samples, packed):
    model, processor = assemble(region_config)
    some = [samples[id] for id in ("text", "both", "box", "none", "two", "later", "second", "file")]
    pad = processor.tokenizer.pad_token_id
    batch = collate_packed([some[:3], some[3:]], pad) if packed else collate_padded(some, pad)
    assert len(batch["pixel_values"]) < len(batch["tile_index"])  # the wide picture's tiles are there once

    def tokens(inputs):
        names = ("pixel_values", "tile_index", "region_cells", "region_first_tile")
        return model.model.get_image_features(**{name: inputs[name] for name in names}).region_tokens

    alone = torch.cat([tokens(collate_padded([sample], pad)) for sample in some])
    # float32 sums in another order
    torch.testing.assert_close(tokens(batch), alone, rtol=1e-4, atol=1e-6)


def test_packed_rows_lose_what_padded_ones_lose(region_config, samples):
    model, processor = assemble(region_config)
    some, pad = list(samples.values()), processor.tokenizer.pad_token_id
    packed, padded = model(**collate_packed([some[:4], some[4:]], pad)).loss, model(**collate_padded(some, pad)).loss
    assert abs(packed - padded) < 1e-5  # float32


@pytest.mark.parametrize("ids", [("none", "text"), ("text",)])
def test_a_batch_without_regions_still_brings_the_region_encoder_a_gradient(region_config, samples, ids):
    model, processor = assemble(region_config)
    batch = collate_padded([samples[id] for id in ids], processor.tokenizer.pad_token_id)
    assert batch["region_cells"].shape[0] == 0
    model(**batch).loss.backward()
    gradients = [parameter.grad for parameter in model.model.region_encoder.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.mark.parametrize(
    ("changes", "kind", "reason"),
    [
        ({"regions": [[BOX, BOX]]}, "regions and marks differ", "1 region marks for 2 regions"),
        ({"regions": [[]]}, "regions and marks differ", "1 region marks for 0 regions"),
        ({"regions": None}, "regions and marks differ", "1 region marks for 0 regions"),
        ({"regions": [BOX]}, "malformed region", "a list of regions for each image"),
        ({"regions": [[BOX], [BOX]]}, "malformed region", "for 2 images, and the row has 1"),
        ({"regions": [[[5, 8, 50, 30]]]}, "malformed region", "a region has list"),
        ({"regions": [[{"box": [5, 8, 50, 30], **RLE}]]}, "malformed region", "'box', 'rle'"),
        ({"regions": [[{"circle": [5, 8, 50]}]]}, "malformed region", "'circle'"),
        ({"regions": "[[{]]"}, "malformed region", "no JSON"),
        ({"regions": [[{"box": [5, 8, 5, 30]}]]}, "malformed region", "region 1"),
        ({"regions": [[{"box": [100, 8, 150, 30]}]]}, "malformed region", "outside of its image"),
        ({"regions": [[{"polygon": [[1, 1, 2, 2]]}]]}, "malformed region", "three points"),
        ({"regions": [[{"rle": {"counts": [1], "size": [40, 90]}}]]}, "malformed region", "broken RLE"),
        ({"regions": [[{"mask": "nowhere.png"}]]}, "malformed region", "does not exist"),
        ({"regions": [[{"mask": "mask.png"}]]}, "malformed region", "is 32x32 but its image is 40x90"),
        ({"regions": [[{"mask": "../mask.png"}]]}, "unsafe path", "leads out of"),
        ({"regions": [[{"mask": [[0, 1]]}]]}, "malformed region", "path of a PNG"),
    ],
)
def test_a_row_with_bad_regions_is_a_reject_with_its_reason(maker, region_data, changes, kind, reason):
    error = reject(maker, region_data, **changes)
    assert error.kind == kind
    assert reason in error.reason
    assert "\n" not in str(error)


def test_a_text_alone_has_no_place_for_a_mark(maker):
    with pytest.raises(RecordError, match="1 region marks for 0 regions"):
        maker.make(Record(id="r", conversation=tuple(talk("what is <mask>?", "a"))))


def test_a_model_that_knows_no_regions_says_so(tiny_processor, region_data):
    error = reject(SampleMaker(tiny_processor), region_data)
    assert error.kind == "regions and marks differ"
    assert "the model knows none" in error.reason


def test_columns_of_parquet_hold_regions_as_structs_or_as_json(region_data, tmp_path):
    empty = dict.fromkeys(("box", "polygon", "rle", "mask"))
    for regions in ([[empty | BOX]], json.dumps([[BOX]])):
        assert read_row(ROWS[0] | {"regions": regions}, region_data.parent, "row").regions == ((BOX,),)


def test_tar_shards_bring_regions_in_their_rows(region_data, tmp_path, maker):
    row = {name: ROWS[0][name] for name in ("conversations", "regions")}
    files = {"k.json": json.dumps(row).encode(), "k.png": (region_data.parent / "wide.png").read_bytes()}
    ((_, record),) = open_shards(write_tar(tmp_path / "a.tar", files)).stream()
    assert record.regions == ((BOX,),)
    assert maker.make(record).region_cells.shape[0] == 1


def test_the_check_counts_regions_and_finds_bad_masks_without_decoding(maker, region_data, tmp_path):
    bad = tmp_path / "bad.jsonl"
    broken = ROWS[0] | {"id": "bad", "regions": [[{"box": [500, 8, 550, 30]}]]}
    bad.write_text("\n".join(map(json.dumps, [*ROWS, broken])))
    report = check_data(open_records(bad, region_data.parent), maker)
    assert (report.usable, report.with_regions, report.regions.total) == (8, 6, 8)
    assert report.rejected == {"malformed region": 1}
    assert "regions      8 in all" in describe(report)


def test_a_batch_of_the_originals_conversations_has_its_labels_and_its_places_for_regions(golden, tmp_path):
    case = json.loads((golden / "osprey" / "cases.json").read_text())["model"]["loss_two"]
    tokenizer = load_llama_tokenizer(golden / "tokenizer", "fast", region_token=True)
    images = TokenPackerImageProcessor(max_tiles=9, **RELEASED_OPTIONS)
    maker = SampleMaker(TokenPackerProcessor(images, tokenizer, row_separator="unknown", region_rule="centre"))
    samples = []
    for number, (image, conversation) in enumerate(zip(case["images"], case["conversations"], strict=True)):
        synthetic(image["h"], image["w"], image["seed"]).save(tmp_path / f"{number}.png")
        regions = []
        for place, shape in enumerate(image["shapes"]):
            mask = drawn(shape, (image["h"], image["w"])).numpy()
            Image.fromarray(mask).save(tmp_path / f"{number}-{place}.png")
            regions.append({"mask": f"{number}-{place}.png"})
        entry = {"image": f"{number}.png", "regions": [regions], "conversations": conversation}
        samples.append(maker.make(read_row(entry, tmp_path, "row")))
    batch = collate_padded(samples, tokenizer.pad_token_id)
    assert batch["labels"].tolist() == case["expanded_labels"]
    marks = batch["input_ids"] == maker.processor.region_token_id
    assert [row.nonzero().flatten().tolist() for row in marks] == case["mask_positions"]
    assert len(batch["tile_index"]) == case["tiles"]
    assert batch["region_first_tile"].tolist() == [0, 0, 5]  # the first picture has four tiles and a thumbnail


def test_only_the_region_encoder_learns_in_the_first_stage_and_the_rest_in_the_second(region_config, tmp_path):
    config = replace(region_config, epochs=6, optimizer=replace(region_config.optimizer, learning_rate=2e-2))
    before, _ = assemble(config)
    folder = train(config, tmp_path / "first")
    after, processor = (
        TokenPackerForConditionalGeneration.from_pretrained(folder),
        TokenPackerProcessor.from_pretrained(folder),
    )
    changed = {name for name, part in before.state_dict().items() if not torch.equal(part, after.state_dict()[name])}
    assert changed == {f"model.region_encoder.{name}" for name in after.model.region_encoder.state_dict()}
    assert processor.region_token_id == after.config.region_token_id
    losses = [step["loss"] for step in json.loads((tmp_path / "first" / "history.json").read_text())["steps"]]
    assert np.mean(losses[-4:]) < np.mean(losses[:4])

    model = replace(config.model, start=str(folder))
    second = replace(config, model=model, train=("projector", "regions", "language_model"), epochs=1)
    later = TokenPackerForConditionalGeneration.from_pretrained(train(second, tmp_path / "second"))
    for part, modules in parts_of(later).items():
        old = [parameter for module in parts_of(after)[part] for parameter in module.parameters()]
        new = [parameter for module in modules for parameter in module.parameters()]
        same = all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
        assert same == (part == "vision_tower")


def test_updates_of_the_language_model_may_learn_beside_the_region_encoder(region_config, tmp_path):
    config = replace(region_config, lora=LoraConfig(rank=2, alpha=4), max_steps=2)
    before, _ = assemble(replace(config, lora=None))
    after = TokenPackerForConditionalGeneration.from_pretrained(train(config, tmp_path)).state_dict()
    changed = {part_of(name) for name, part in before.state_dict().items() if not torch.equal(part, after[name])}
    assert changed == {"regions", "language_model"}


def test_a_plan_holds_every_sample_once_an_epoch_whether_it_has_regions_or_not(region_config, tmp_path):
    processor = load_processor(region_config.model, with_regions=True)
    source = open_source(replace(region_config, epochs=1), processor, tmp_path)
    batches = [source.batches[number] for number in range(len(source.batches))]
    ids = [id for batch in batches for id in batch[IDS] if id]  # others fill a step up
    assert sorted(ids) == sorted(entry["id"] for entry in ROWS)
    assert all(batch["region_cells"].shape[0] == len(batch["region_first_tile"]) for batch in batches)


def test_the_preview_counts_a_region_encoder_that_is_yet_to_be_made(region_config):
    shown = preview(region_config)
    model, _ = assemble(region_config)
    count = sum(parameter.numel() for parameter in model.model.region_encoder.parameters())
    assert shown.parameters["regions"] == {"trainable": count, "frozen": 0}
    assert shown.parameters["projector"]["trainable"] == 0
    assert shown.samples["regions"] == 8


def test_a_drawn_row_tints_the_pixels_of_its_regions(region_data):
    records = open_records(region_data)
    plain = draw_record(replace(records[0], regions=()))
    page = draw_record(records[0])
    assert page.size == plain.size
    different = np.asarray(page).astype(int) != np.asarray(plain)
    tinted = different.any(axis=2)
    scale = 640 / 90  # the picture is 90 wide, the page's column 640 with a margin of 36
    # Through the middle, where no number is. One pixel each way: edges fall between the pixels of the larger picture.
    (cols,), (rows,) = np.nonzero(tinted[round(36 + 19 * scale)]), np.nonzero(tinted[:, round(36 + 27 * scale)])
    assert abs(cols.min() - 36 - 5 * scale) <= scale
    assert abs(cols.max() - 36 - 50 * scale) <= scale
    assert abs(rows.min() - 36 - 8 * scale) <= scale
    assert abs(rows.max() - 36 - 30 * scale) <= scale


@pytest.mark.slow
def test_two_processes_of_which_one_may_have_no_regions_lose_what_one_loses(region_config, tmp_path):
    assert start(Start(region_config.to_dict(), tmp_path / "one")) == [0]
    assert start(Start(region_config.to_dict(), tmp_path / "two", num_processes=2)) == [0, 0]
    losses = [[step["loss"] for step in history(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)  # float32 sums over processes come in another order


def test_a_row_whose_marks_and_regions_differ_is_not_drawn(region_data):
    record = open_records(region_data)[0]
    asked = [{**message, "value": message["value"] + " <mask>"} for message in record.conversation[:1]]
    with pytest.raises(ValueError, match=r"has \d+ <mask> and \d+ regions; write as many of both"):
        draw_record(replace(record, conversation=(*asked, *record.conversation[1:])))
