"""Gives a model and its processor what regions need: a region encoder, and the `<mask>` token."""

from __future__ import annotations

import copy
import json
import tempfile
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from tokenpacker.hf.processing.llama_tokenizer import REGION_TOKEN, UNREACHABLE_PIECES, load_llama_tokenizer
from tokenpacker.regions import RegionEncoder, RegionRule, check_rule

if TYPE_CHECKING:
    from tokenpacker.hf.model import TokenPackerForConditionalGeneration
    from tokenpacker.hf.processing.processor import TokenPackerProcessor

BYTE_LEVEL_PIECE = "\u00fe"  # how byte-level vocabularies write the byte 0xFE, which no UTF-8 text contains


def add_regions(
    model: TokenPackerForConditionalGeneration, processor: TokenPackerProcessor, rule: RegionRule = "coverage"
) -> None:
    """Gives model and processor what regions need, in place: an untrained region encoder, and the `<mask>` token.

    All other weights stay the same, and so do the ids of prompts without `<mask>`. The embedding grows only if the
    vocabulary has no free piece, see `add_region_token`.

    Args:
        rule: how much a patch counts, see `tokenpacker.regions.RegionRule`.

    Raises:
        ValueError: if the model knows regions already, and for an unknown rule.
    """
    config = model.config
    if config.regions is not None:
        raise ValueError("the model knows regions already; train them further, or start from one that does not")
    processor.region_rule = check_rule(rule)
    processor.tokenizer = add_region_token(processor.tokenizer)
    token_id = int(processor.tokenizer.convert_tokens_to_ids(REGION_TOKEN))
    if token_id >= config.text_config.vocab_size:
        model.resize_token_embeddings(token_id + 1)
    config.set_regions(token_id)
    assert config.regions is not None
    weight = next(model.model.multi_modal_projector.parameters())
    model.model.region_encoder = RegionEncoder(config.regions).to(weight.device, weight.dtype)


def add_region_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer with `<mask>` as one token; the same object if it has one already.

    `<mask>` takes the id of a byte piece that no text can produce, so that no id changes and none is added: of `<0xFE>`
    in vocabularies like LLaMA's, of the same byte in byte-level ones. Other vocabularies get one more token.
    """
    vocabulary = tokenizer.get_vocab()
    if REGION_TOKEN in vocabulary:
        return tokenizer
    if tokenizer.init_kwargs.get("llama_variant"):
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            return load_llama_tokenizer(
                folder,
                extra_tokens=() if UNREACHABLE_PIECES[REGION_TOKEN] in vocabulary else (REGION_TOKEN,),
                model_max_length=tokenizer.model_max_length,
                padding_side=tokenizer.padding_side,
                region_token=True,
            )
    changed = copy.deepcopy(tokenizer)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    piece = _spare_piece(content)
    if piece is not None:
        content["model"]["vocab"][REGION_TOKEN] = content["model"]["vocab"].pop(piece)
        changed._tokenizer = Tokenizer.from_str(json.dumps(content))
    changed.add_tokens([AddedToken(REGION_TOKEN, special=True, normalized=False)], special_tokens=True)
    return changed


def _spare_piece(content: dict[str, Any]) -> str | None:
    """The piece of the byte 0xFE in the content of a tokenizer's file; None if there is none or a merge uses it."""
    model = content["model"]
    if model["type"] != "BPE":
        return None
    byte_level = "ByteLevel" in json.dumps([content["pre_tokenizer"], content["decoder"]])
    piece = BYTE_LEVEL_PIECE if byte_level else UNREACHABLE_PIECES[REGION_TOKEN]
    merged = any(piece in part for merge in model["merges"] for part in merge)
    return None if merged or piece not in model["vocab"] else piece
