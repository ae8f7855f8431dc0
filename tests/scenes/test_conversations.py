import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tokenpacker.scenes import Question
from tokenpacker.scenes.conversations import Segment, make_segment, pack
from tokenpacker.sequence import IGNORED


def tiny_language_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_a_segment_in_a_shared_sequence_computes_what_it_computes_alone():
    model = tiny_language_model()
    prefixes = [[1, 5, 6, 7, 8], [1, 9]]
    segments = [
        [Segment((10, 11, 12), (IGNORED,) * 3), Segment((13, 14), (IGNORED,) * 2)],
        [Segment((15,), (IGNORED,))],
    ]
    together = model(**without_labels(pack(prefixes, segments, pad_id=0))).logits
    for row, (prefix, parts) in enumerate(zip(prefixes, segments, strict=True)):
        start = len(prefix)
        for part in parts:
            stop = start + len(part.input_ids)
            alone = model(torch.tensor([[*prefix, *part.input_ids]])).logits[0, len(prefix) :]
            torch.testing.assert_close(together[row, start:stop], alone, atol=1e-5, rtol=0)  # float32 summation order
            start = stop


def without_labels(batch):
    return {key: value for key, value in batch.items() if key != "labels"}


def test_only_answers_and_end_marks_are_learned(tiny_tokenizer):
    turns = [Question("what color?", "red", "color"), Question("what shape?", "star", "shape")]
    segment = make_segment(tiny_tokenizer, turns)
    learned = [token for token, label in zip(segment.input_ids, segment.labels, strict=True) if label != IGNORED]
    assert tiny_tokenizer.decode(learned) == " red</s> star</s>"
    assert [label for label in segment.labels if label != IGNORED] == learned


def test_a_segment_reads_as_the_chat_template_writes_it(tiny_tokenizer):
    from tokenpacker.hf.processing.chat import chat_template

    turns = [Question("what color?", "red", "color"), Question("what shape?", "star", "shape")]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": turns[0].text}]},
        {"role": "assistant", "content": turns[0].answer},
        {"role": "user", "content": turns[1].text},
        {"role": "assistant", "content": turns[1].answer},
    ]
    written = tiny_tokenizer.apply_chat_template(messages, chat_template=chat_template(), tokenize=False)
    segment = tiny_tokenizer.decode(make_segment(tiny_tokenizer, turns).input_ids)
    assert written == "<s>USER: <image>\n" + segment
