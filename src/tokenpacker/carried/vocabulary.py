"""Trains the tokenizers of small models: byte-level BPE on generated texts, so that no file is needed.

In the tiny model's tokenizer, each word of its two data sets is one token, and so are each digit, "," and a newline,
which separate tiles. Any other text is encoded as bytes.
"""

from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tokenpacker.scenes import easy_vqa, fine_print

UNKNOWN_TOKEN, BEGIN_TOKEN, END_TOKEN, IMAGE_TOKEN = "<unk>", "<s>", "</s>", "<image>"
VOCABULARY_SIZE = 640
NUM_SCENES = 1500
PIECES = r" ?[A-Za-z]+| ?\d| ?[^A-Za-z\d\s]|\s"  # a word, a digit or a sign with the space before it, or white space


def train_tokenizer(
    texts: Iterable[str] | None = None, vocabulary_size: int = VOCABULARY_SIZE
) -> PreTrainedTokenizerFast:
    """A tokenizer for some texts; it is the same on every call.

    Args:
        texts: None takes the texts that the tiny model is trained on.
        vocabulary_size: the most tokens. All bytes and the special tokens are always included.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN_TOKEN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[UNKNOWN_TOKEN, BEGIN_TOKEN, END_TOKEN, AddedToken(IMAGE_TOKEN, special=True, normalized=False)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts() if texts is None else texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN_TOKEN,
        bos_token=BEGIN_TOKEN,
        eos_token=END_TOKEN,
        pad_token=UNKNOWN_TOKEN,
        additional_special_tokens=[IMAGE_TOKEN],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _texts() -> Iterator[str]:
    """Questions, answers and captions as in training; each answer has the space that precedes it in a chat."""
    texts = [f"USER: \n{question} ASSISTANT:" for question in easy_vqa.all_question_texts()]
    texts += [f" {word}" for word in (*fine_print.WORDS, *easy_vqa.COLORS, *fine_print.FRAME_COLORS, "yes", "no")] * 20
    yield from texts * 20
    scenes = fine_print.FinePrint("foundation")
    for index in range(NUM_SCENES):
        scene, questions = scenes.truth(index)
        yield f"USER: \n{fine_print.describe(scene)}"
        for question in questions:
            yield f"{question.text} ASSISTANT: {question.answer}"
