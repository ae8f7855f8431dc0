"""Reads a LLaMA tokenizer's folder: vocabulary, merges, special and added tokens, in old and new file formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models
from transformers.convert_slow_tokenizer import SentencePieceExtractor

NORMAL_PIECE = 1  # sentencepiece's type of pieces that text can become


def read_json(path: Path) -> dict[str, Any]:
    """The file's content; an empty dict without a file. Raises ValueError for what is no JSON object."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; fetch it again")
    return content


def read_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]], dict[str, int]]:
    """Pieces with their ids, merges in the order of their rank, and added tokens with ids if the same file has them.

    Raises:
        ValueError: for a file that is missing or damaged, and for a vocabulary that is not of LLaMA's kind.
    """
    path = folder / "tokenizer.model"
    if path.is_file():
        return (*_read_sentencepiece(path), {})
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{folder} has neither tokenizer.model nor tokenizer.json; copy one of them there")
    try:
        content = json.loads(Tokenizer.from_file(str(path)).to_str())
    except Exception as error:  # the library raises a bare Exception
        raise ValueError(f"{path} cannot be read ({error}); fetch it again") from error
    model = content["model"]
    if model["type"] != "BPE":
        raise ValueError(f"{path} holds a {model['type']} model; LLaMA's is BPE, use the folder of a LLaMA model")
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    return model["vocab"], [(left, right) for left, right in model["merges"]], added


def special_names(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Start, end, unknown and padding token by role. Raises ValueError for one that is no text."""
    given = {**config, **read_json(folder / "special_tokens_map.json")}
    names = {}
    for role, usual in {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}.items():
        names[role] = _content(given.get(role)) or usual
    return {**names, "pad_token": _content(given.get("pad_token")) or names["unk_token"]}


def read_added(folder: Path, config: dict[str, Any]) -> dict[str, int]:
    """Added tokens with their ids, from the config or a file of their own. Raises ValueError for anything else."""
    try:
        listed = {str(_content(entry)): int(index) for index, entry in config.get("added_tokens_decoder", {}).items()}
        return listed | {name: int(index) for name, index in read_json(folder / "added_tokens.json").items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"the added tokens of {folder} are no names with ids ({error}); fetch it again") from None


def max_length(folder: Path, config: dict[str, Any]) -> int:
    """Tokens of the longest text; without bound if the config names none. Raises ValueError for no number."""
    value = config.get("model_max_length") or int(1e30)
    if type(value) not in (int, float) or value < 1:
        raise ValueError(f"{folder} has model_max_length={value!r}; it must be a number of tokens")
    return int(value)


def _read_sentencepiece(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    try:
        extractor = SentencePieceExtractor(str(path))
        parts = extractor.extract(models.BPE)
    except Exception as error:  # protobuf's own class, which differs between its versions
        raise ValueError(f"{path} cannot be read as a sentencepiece model; fetch it again") from error
    spec = extractor.proto.normalizer_spec
    if extractor.proto.trainer_spec.model_type != 2 or not len(extractor.proto.pieces):
        raise ValueError(f"{path} holds no BPE vocabulary as LLaMA's does; use the folder of a LLaMA model")
    if spec.precompiled_charsmap or spec.remove_extra_whitespaces or not spec.add_dummy_prefix:
        raise ValueError(
            f"{path} normalizes text ({spec.name}), which LLaMA's does not; use the folder of a LLaMA model"
        )
    text = {piece.piece for piece in extractor.proto.pieces if piece.type == NORMAL_PIECE}
    return parts["vocab"], [pair for pair in parts["merges"] if "".join(pair) in text]


def _content(entry: Any) -> str | None:
    """A token's text, given alone or as the dict of an added token. Raises ValueError for anything else."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    if (text in (None, "") and isinstance(entry, dict)) or not isinstance(text, (str, type(None))):
        raise ValueError(f"a special token is given as {entry!r}, which is no text; fetch the tokenizer again")
    return text
