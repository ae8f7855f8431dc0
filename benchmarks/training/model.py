"""The training benchmark's random model, and its processor."""

from __future__ import annotations

from benchmarks.training.data import all_texts
from benchmarks.training.settings import MAX_TILES, SCALE_FACTOR, Settings
from tokenpacker.carried.vocabulary import IMAGE_TOKEN, train_tokenizer
from tokenpacker.hf import TokenPackerConfig, TokenPackerForConditionalGeneration, TokenPackerProcessor
from tokenpacker.hf.processing.chat import VICUNA_SYSTEM
from tokenpacker.train.assemble import parts_of

MOST_TOKENS = 2048  # more than there are words and bytes, so that each is one


def build(settings: Settings) -> tuple[TokenPackerForConditionalGeneration, TokenPackerProcessor]:
    """The random model, its tower frozen, and its processor."""
    tokenizer = train_tokenizer([*all_texts(), f"{VICUNA_SYSTEM} USER: \n ASSISTANT:"], MOST_TOKENS)
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
