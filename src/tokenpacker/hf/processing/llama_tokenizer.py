"""LLaMA tokenizers of released checkpoints: `tokenizer.model` in, one fast tokenizer out, with exactly the same ids.

The original code ran on the tokenizers of 2023, which today's libraries no longer reproduce. There are three variants:

- `slow`: what checkpoints with `"legacy": false` (Vicuna 1.5) were trained with. Each text between special tokens is
  encoded with sentencepiece's leading "▁", and the "▁" is then taken off its first piece, unless the text opened the
  prompt or begins with a space.
- `slow_legacy`: what checkpoints with `"legacy": true` (or no flag) were trained with. The "▁" stays everywhere.
- `fast`: what the original evaluated with, whatever the flag says. As `slow_legacy`, but spaces around added tokens
  stay too.

In all of them a text after `<image>`, or after the `<s>` that opens the prompt, is encoded as a new text: the original
encoded the texts between images one by one. All of this stands in the tokenizer's own normalizer, so that
`tokenizer(prompt)`, vLLM and a reloaded folder give the same ids. `encode_as_trained` adds one rule that no normalizer
can express.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import to_py_obj

from tokenpacker.hf.processing.chat import AFTER_END_MARK
from tokenpacker.hf.processing.llama_tokenizer_files import (
    max_length,
    read_added,
    read_json,
    read_vocabulary,
    special_names,
)
from tokenpacker.text import check_text

Variant = Literal["slow", "slow_legacy", "fast"]
IMAGE_TOKEN, REGION_TOKEN = "<image>", "<mask>"
# No UTF-8 text contains these bytes, so the embedding rows of their pieces are free for marks.
UNREACHABLE_PIECES = {IMAGE_TOKEN: "<0xFF>", REGION_TOKEN: "<0xFE>"}
MARKER = "▁"  # sentencepiece's space
BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
BROKEN_BYTE = re.compile("[\udc80-\udcff]")  # as Python's "surrogateescape" marks it
REPLACEMENT = "�"  # what sentencepiece writes for each
WHITESPACE = r"[\s\x1c-\x1f]*"  # what Python's str.strip strips


class ReleasedLlamaTokenizer(PreTrainedTokenizerFast):
    """A fast tokenizer that decodes ids as sentencepiece does, also if byte pieces form no whole character.

    The library's decoder replaces a whole run of byte pieces if one is broken, as at the end of an answer that is cut
    within a character. Without this package a saved folder loads as a plain fast tokenizer.
    """

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> Any:
        """The text of a sequence of ids, or the texts of several."""
        text = super().decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs)
        if "llama_variant" not in self.init_kwargs:
            return text
        if isinstance(text, list):
            rows = zip(text, token_ids, strict=True)
            return [self._mend(one, to_py_obj(ids), skip_special_tokens) for one, ids in rows]
        return self._mend(text, to_py_obj(token_ids), skip_special_tokens)

    def _mend(self, text: str, ids: int | list[int], skip_special_tokens: bool) -> str:
        if REPLACEMENT not in text:
            return text
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        tokens = self.convert_ids_to_tokens([index for index in np.atleast_1d(ids).tolist() if index not in skipped])
        content = b"".join(
            bytes([int(byte[1], 16)]) if (byte := BYTE_PIECE.fullmatch(token)) else token.encode() for token in tokens
        )
        text = content.decode(errors="surrogateescape").removeprefix(MARKER).replace(MARKER, " ")
        return BROKEN_BYTE.sub(REPLACEMENT, text)


def load_llama_tokenizer(
    folder: str | Path,
    variant: Variant | None = None,
    *,
    extra_tokens: Sequence[str] = (),
    model_max_length: int | None = None,
    padding_side: Literal["left", "right"] = "left",
    vocab_size: int | None = None,
    region_token: bool = False,
) -> ReleasedLlamaTokenizer:
    """The tokenizer of a folder in the original layout, which may be saved and loaded again.

    `<image>` is one token. If the folder has none, it takes the id of the byte piece `<0xFF>`, which no text can
    produce, so that released weights keep their shape. With `region_token`, `<mask>` takes that of `<0xFE>`. Padding is
    the unknown token unless the folder names another.

    Args:
        folder: holds `tokenizer.model` (or `tokenizer.json`, of which the vocabulary is taken), `tokenizer_config.json`
            and the files beside them.
        variant: see the module; None takes the slow variant that the folder's `legacy` flag asks for, or the variant
            that the folder was saved with.
        extra_tokens: added tokens that the folder may lack; missing ones get the next ids, in order.
        model_max_length: None takes the folder's own.
        padding_side: left for batched generation.
        vocab_size: rows of the model's embedding, which the vocabulary must fit; None checks nothing.
        region_token: whether `<mask>` is a token; if not, it is ordinary text. Released weights need this: the original
            gave it the id after the last row, for which there is no embedding. Such an id is ignored here.

    Raises:
        ValueError: for a missing or damaged file, an unknown variant, ids that contradict each other and a vocabulary
            that is larger than `vocab_size`.
    """
    if variant is not None and variant not in get_args(Variant):
        raise ValueError(f"variant={variant!r} is unknown; use one of {', '.join(get_args(Variant))}, or None")
    folder = Path(folder)
    config = read_json(folder / "tokenizer_config.json")
    if not config.get("add_bos_token", True) or config.get("add_eos_token", False):
        raise ValueError(
            f"{folder}/tokenizer_config.json sets add_bos_token or add_eos_token against LLaMA's usage; the released "
            "formats open with the start token and write end marks themselves, so remove both keys"
        )
    vocabulary, merges, given = read_vocabulary(folder)
    names = special_names(folder, config)
    given |= read_added(folder, config)
    if region_token and vocab_size is not None and given.get(REGION_TOKEN, 0) >= vocab_size:
        del given[REGION_TOKEN]
    added = _number_added(folder, given, vocabulary, [*names.values(), *extra_tokens])
    for mark in (IMAGE_TOKEN, REGION_TOKEN)[: 1 + region_token]:
        _place_mark(mark, folder, vocabulary, added)
    size = max([*vocabulary.values(), *added.values()]) + 1
    if vocab_size is not None and size > vocab_size:
        raise ValueError(
            f"{folder} has {size} tokens but the model's vocab_size={vocab_size}; the tokenizer belongs to another "
            "model, or the embedding must be resized first"
        )
    variant = variant or config.get("llama_variant") or ("slow_legacy" if config.get("legacy", True) else "slow")
    return ReleasedLlamaTokenizer(
        tokenizer_object=_build(vocabulary, merges, added, names, variant),
        **{role: _special(name) for role, name in names.items()},
        extra_special_tokens=[_special(name) for name in added if name not in names.values()],
        model_max_length=model_max_length or max_length(folder, config),
        padding_side=padding_side,
        clean_up_tokenization_spaces=False,
        llama_variant=variant,
    )


def encode_as_trained(tokenizer: PreTrainedTokenizerBase, text: str, *, image_marks: bool = True) -> list[int]:
    """The ids of `text` exactly as the original's training code had them, without the start token.

    They equal `tokenizer(text)` except for variant `slow` and a word directly after a literal special token: the
    original encoded the word as if a space preceded it and then removed the space, which depends on the vocabulary's
    merges. (`USER:`, which follows the end mark in a chat, is right in both.) Tokenizers that `load_llama_tokenizer`
    did not make are simply called.

    Args:
        image_marks: False reads a literal `<image>` as ordinary text, as the original did in conversations
            without an image.

    Raises:
        ValueError: if another tokenizer would have to read `<image>` as text, and for what is no Unicode text.
    """
    check_text(text)
    variant = tokenizer.init_kwargs.get("llama_variant")
    if variant is None:
        if not image_marks and IMAGE_TOKEN in text:
            raise ValueError(f"a text without an image contains {IMAGE_TOKEN!r}; write something else there")
        return list(tokenizer(text, add_special_tokens=False).input_ids)
    marks = [IMAGE_TOKEN] if image_marks else []
    names = {name: index for name, index in tokenizer.get_added_vocab().items() if name != IMAGE_TOKEN}
    own = {str(value) for role, value in tokenizer.special_tokens_map.items() if role.endswith("_token")}
    stripped = () if variant == "fast" else tuple(name for name in names if name not in own)
    text = text.replace(MARKER, " ") if variant == "slow" else text
    ids: list[int] = []
    for number, chunk in enumerate(_split(text, marks)):
        if number % 2:
            ids.append(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
            continue
        for stripper in stripped:
            chunk = re.sub(f"{WHITESPACE}{re.escape(stripper)}{WHITESPACE}", stripper, chunk)
        for place, part in enumerate(_split(chunk, names)):
            chop = variant == "slow" and place > 0 and not part.startswith(" ")
            ids += [names[part]] if place % 2 else _piece_ids(tokenizer, part, chop)
    return ids


def _normalizer(variant: Variant, names: dict[str, str], added: Collection[str]) -> normalizers.Normalizer:
    """Text to what the merges work on: spaces become "▁", and each text gets its leading one.

    Args:
        names: start, end, unknown and padding token by role.
        added: all special tokens.
    """
    steps: list[normalizers.Normalizer] = []
    if variant == "slow":
        steps.append(normalizers.Replace(MARKER, " "))
    if variant != "fast":
        steps += [
            normalizers.Replace(Regex(f"{WHITESPACE}{_escape(name)}{WHITESPACE}"), name)
            for name in added
            if name not in names.values() and name != IMAGE_TOKEN
        ]
    specials = "|".join(_escape(name) for name in added)
    fresh = rf"(?<=\A|\A{_escape(names['bos_token'])}|{_escape(IMAGE_TOKEN)})(?!\z|{specials})"
    follows = rf"(?<={specials})" + ("(?= )" if variant == "slow" else rf"(?!\z|{specials})")
    steps += [normalizers.Replace(Regex(f"{fresh}|{follows}"), MARKER), normalizers.Replace(" ", MARKER)]
    return normalizers.Sequence(steps)


def _build(
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    added: dict[str, int],
    names: dict[str, str],
    variant: Variant,
) -> Tokenizer:
    """The library's tokenizer. Special tokens are matched after normalization, so that the normalizer sees all text."""
    unknown, bos = names["unk_token"], names["bos_token"]
    byte_fallback = "<0x00>" in vocabulary
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback, dropout=None)
    )
    tokenizer.add_special_tokens([_special(name) for name in sorted(added, key=lambda name: added[name])])
    wrong = [name for name, index in added.items() if tokenizer.token_to_id(name) != index]
    if wrong:
        raise ValueError(
            f"added token {wrong[0]!r} wants id {added[wrong[0]]}, but the next free one is "
            f"{tokenizer.token_to_id(wrong[0])}; number the added tokens without gaps after the vocabulary"
        )
    tokenizer.normalizer = _normalizer(variant, names, added)
    if variant == "slow":
        tokenizer.pre_tokenizer = _cut_roles(tokenizer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, added[bos])]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(MARKER, 1, 0), decoders.Replace(MARKER, " ")]
    )
    return tokenizer


def _cut_roles(tokenizer: Tokenizer) -> pre_tokenizers.PreTokenizer | None:
    """Splits the text after an end mark in a chat where the original's first piece ended.

    The original encoded `</s>USER:` as "▁US" "ER" ":" and took off the "▁", although "USER" alone may be one piece.
    """
    first = tokenizer.model.tokenize(f"{MARKER}{AFTER_END_MARK}{MARKER}")[0].value.removeprefix(MARKER)
    if not first or first not in tokenizer.get_vocab():
        return None
    rest = AFTER_END_MARK.removeprefix(first)
    return pre_tokenizers.Split(Regex(rf"\A{_escape(first)}(?={_escape(rest)})"), "isolated")


def _piece_ids(tokenizer: PreTrainedTokenizerBase, part: str, chop: bool) -> list[int]:
    """Ids of a text without special tokens; `chop` takes the leading "▁" off the first piece afterwards."""
    if not part:
        return []
    pieces = tokenizer.backend_tokenizer.model.tokenize(MARKER + part.replace(" ", MARKER))
    ids = [piece.id for piece in pieces]
    if not chop or not pieces[0].value.startswith(MARKER):
        return ids
    rest = pieces[0].value[len(MARKER) :]
    return [tokenizer.convert_tokens_to_ids(rest), *ids[1:]] if rest else ids[1:]


def _split(text: str, marks: Iterable[str]) -> list[str]:
    """Texts at even places, the marks between them at odd ones."""
    pattern = "|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True))
    return re.split(f"({pattern})", text) if pattern else [text]


def _number_added(
    folder: Path, given: dict[str, int], vocabulary: dict[str, int], wanted: Sequence[str]
) -> dict[str, int]:
    """The ids of `given` tokens, and of those of `wanted` that have none yet; in the order of the ids."""
    for name, index in given.items():
        if vocabulary.get(name, index) != index:
            raise ValueError(f"{folder} gives {name!r} the ids {vocabulary[name]} and {index}; keep the first one")
    ids = dict(given)
    for name in wanted:
        if name not in ids:
            ids[name] = vocabulary.get(name, max([*vocabulary.values(), *ids.values()]) + 1)
    return dict(sorted(ids.items(), key=lambda item: item[1]))


def _place_mark(mark: str, folder: Path, vocabulary: dict[str, int], added: dict[str, int]) -> None:
    """Gives `<image>` or `<mask>` an id, in both tables; see `load_llama_tokenizer`."""
    if mark in added:
        return
    if mark not in vocabulary:
        piece = UNREACHABLE_PIECES[mark]
        if piece not in vocabulary:
            raise ValueError(
                f"the vocabulary of {folder} has no byte piece {piece} to stand for {mark}; "
                f"pass extra_tokens=[{mark!r}] and resize the embedding"
            )
        vocabulary[mark] = vocabulary.pop(piece)
    added[mark] = vocabulary[mark]


def _special(name: str) -> AddedToken:
    return AddedToken(name, special=True, normalized=True)


def _escape(text: str) -> str:
    """`text` as a pattern of the tokenizers library, which knows fewer escapes than Python."""
    return re.sub(r"([\\.^$|?*+()\[\]{}])", r"\\\1", text)
