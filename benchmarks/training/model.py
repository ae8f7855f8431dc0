"""The training benchmark's random model, and a tokenizer for its samples."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.training.data import all_texts
from benchmarks.training.settings import MAX_TILES, SCALE_FACTOR, Settings
from tokenpacker.hf import TokenPackerConfig, TokenPackerForConditionalGeneration, TokenPackerProcessor
from tokenpacker.hf.chat import VICUNA_SYSTEM
from tokenpacker.train.assemble import parts_of
from tokenpacker.train.tokenizer import BEGIN_TOKEN, END_TOKEN, IMAGE_TOKEN, PIECES, UNKNOWN_TOKEN

MOST_TOKENS = 2048  # more than there are words and bytes, so that each is one


def build(settings: Settings) -> tuple[TokenPackerForConditionalGeneration, TokenPackerProcessor]:
    """The random model, its tower frozen, and its processor."""
    tokenizer = _tokenizer()
    config = TokenPackerConfig(
        {"model_type": "clip_vision_model", **settings.vision_config},
        {"model_type": "llama", "pad_token_id": tokenizer.pad_token_id, **settings.text_config},
        projector_config={"name": "token-packer", "scale_factor": SCALE_FACTOR},
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
    )
    model = TokenPackerForConditionalGeneration(config).train()
    model.config.use_cache = model.config.text_config.use_cache = False
    for part in parts_of(model)["vision_tower"]:
        part.requires_grad_(False)
    processor = TokenPackerProcessor.from_config(config, tokenizer, image_mode="slice", max_tiles=MAX_TILES)
    return model, processor


def _tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word of the samples and of the chat format; other text as bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN_TOKEN))
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    image_token = AddedToken(IMAGE_TOKEN, special=True, normalized=False)
    trainer = trainers.BpeTrainer(
        vocab_size=MOST_TOKENS,
        special_tokens=[UNKNOWN_TOKEN, BEGIN_TOKEN, END_TOKEN, image_token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*all_texts(), f"{VICUNA_SYSTEM} USER: \n ASSISTANT:"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN_TOKEN,
        bos_token=BEGIN_TOKEN,
        eos_token=END_TOKEN,
        pad_token=UNKNOWN_TOKEN,
        additional_special_tokens=[IMAGE_TOKEN],
        clean_up_tokenization_spaces=False,
    )
