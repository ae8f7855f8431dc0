"""Answers from an exported folder, without torch's model."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading

import pytest

from tokenpacker.export import ExportedAnswerer, compare_answers
from tokenpacker.export.agreement import answer_by_torch, check_questions
from tokenpacker.scenes import FinePrint

SIGN = FinePrint("test")[0]


def about(images, text):
    return [{"role": "user", "content": [*({"type": "image"} for _ in images), {"type": "text", "text": text}]}]


def test_the_answer_is_that_of_the_text_streamed_token_by_token(answerer):
    messages = about([SIGN.image], SIGN.questions[0].text)
    streamed = list(answerer.stream(messages, [SIGN.image], scale_factor=3))
    assert "".join(text for _, text in streamed).strip() == answerer.answer(messages, [SIGN.image], scale_factor=3)
    assert streamed[-1][0] in answerer.end_ids


def test_greedy_tokens_equal_those_of_torch(answerer, carried):
    agreement = compare_answers(carried[0], answerer, 12)  # each kind of question at each scale factor
    assert agreement.questions == agreement.equal_answers == 12
    assert agreement.tokens == agreement.equal_tokens > 12
    assert agreement.scored == 9
    assert agreement.torch_correct == agreement.exported_correct > 4


def test_the_questions_of_a_check_have_one_tile_several_and_several_images(answerer):
    asked = list(check_questions(answerer, 12))
    tiles = [answerer.prepare(q.messages, q.images, q.scale_factor, q.max_image_tokens) for q in asked]
    assert {len(question.images) for question in asked} == {1, 2}
    assert all(len(inputs["pixel_values"]) == 1 for inputs in tiles[2::4])
    assert any(len(inputs["pixel_values"]) > 4 for inputs in tiles)
    assert {question.scale_factor for question in asked} == {2, 3, 4}


def test_tiles_may_have_different_scale_factors(answerer, carried):
    model, processor = carried
    prompt = processor.apply_chat_template(about([SIGN.image], "how many words are there?"), add_generation_prompt=True)
    num_tiles = processor.image_layout(SIGN.image.size[::-1]).tile_grid.num_tiles
    factors = [(2, 3, 4)[tile % 3] for tile in range(num_tiles)]
    inputs = dict(processor([SIGN.image], [prompt], scale_factor=[factors], return_tensors="np"))
    assert list(answerer.generate(inputs, 16)) == answer_by_torch(model, inputs, answerer.end_ids)


def test_auto_takes_the_graphs_of_the_routers_scale_factors(answerer, carried, monkeypatch):
    model, messages = carried[0], about([SIGN.image], "how many words are there?")
    with pytest.raises(ValueError, match=r"a tile's scale_factor=\d+ was not exported; use 2, 3, 4, or export it"):
        answerer.prepare(messages, [SIGN.image], "auto")
    router = {"scale_factors": [2, 4], "detail": [0.04], "thumbnail_detail": [9.0]}
    monkeypatch.setattr(answerer.processor, "router", router)
    inputs = answerer.prepare(messages, [SIGN.image], "auto")
    assert set(inputs["scale_factors"].tolist()) == {2, 4}
    assert list(answerer.generate(inputs, 16)) == answer_by_torch(model, inputs, answerer.end_ids)


def test_several_threads_get_their_own_answers(answerer):
    samples = [FinePrint("test")[index] for index in range(4)]
    asked = [(about([sample.image], sample.questions[0].text), [sample.image]) for sample in samples]
    alone = [answerer.answer(*question) for question in asked]
    together: list[str | None] = [None] * len(asked)

    def ask(place):
        together[place] = answerer.answer(*asked[place])

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert len(set(alone)) > 1


def test_a_conversation_without_images_is_answered(answerer):
    assert list(answerer.stream([{"role": "user", "content": "hello"}], max_new_tokens=3))


def test_what_was_not_exported_and_what_is_too_long_is_refused(answerer):
    with pytest.raises(ValueError, match=r"scale_factor=6 was not exported; use 2, 3, 4, or export it, too"):
        answerer.answer(about([SIGN.image], "?"), [SIGN.image], scale_factor=6)
    with pytest.raises(ValueError, match=r"tokens but the model reads fewer than 4096; pack more, or use fewer images"):
        answerer.answer([{"role": "user", "content": "word " * 5000}])


@pytest.fixture
def copy(onnx_folder, tmp_path):
    return shutil.copytree(onnx_folder, tmp_path / "copy")


def rewrite(folder, change):
    manifest = json.loads((folder / "export.json").read_text())
    change(manifest)
    (folder / "export.json").write_text(json.dumps(manifest))


def test_a_truncated_graph_is_told_in_one_line(copy):
    graph = copy / "onnx" / "decoder_model_merged.onnx"
    graph.write_bytes(graph.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"decoder_model_merged.onnx has 5000 bytes, not \d+; copy the folder again"):
        ExportedAnswerer(copy)
    told_as = {"bytes": 5000, "sha256": hashlib.sha256(graph.read_bytes()).hexdigest()}
    rewrite(copy, lambda manifest: manifest["files"].update({"onnx/decoder_model_merged.onnx": told_as}))
    with pytest.raises(
        ValueError, match=r"decoder_model_merged.onnx cannot be read \(.*\); export the model anew"
    ) as told:
        ExportedAnswerer(copy)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", ["onnx/decoder_model_merged.onnx", "tokenizer.json"])
def test_a_file_of_the_same_size_with_other_bytes_is_told(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} has another SHA-256 than export.json says; copy the folder again"):
        ExportedAnswerer(copy)


def test_missing_files_and_damaged_manifests_are_told(copy, tmp_path):
    with pytest.raises(ValueError, match=r"has no export.json; give a folder that `tokenpacker export` wrote"):
        ExportedAnswerer(tmp_path)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer.json is missing; copy the folder again, or export the model anew"):
        ExportedAnswerer(copy)
    rewrite(copy, lambda manifest: manifest.pop("cache"))
    with pytest.raises(ValueError, match=r"export.json is damaged \(.*cache.*\); export the model anew"):
        ExportedAnswerer(copy)


def test_a_missing_runtime_is_named_with_its_remedy(onnx_folder, monkeypatch):
    monkeypatch.setattr("tokenpacker.export.answerer.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"runs on onnx; run: pip install 'tokenpacker\[export\]'"):
        ExportedAnswerer(onnx_folder)
