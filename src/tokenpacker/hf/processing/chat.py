"""The conversation formats as Jinja chat templates, for training, inference and serving.

The default is Vicuna's: a system text, `USER: question ASSISTANT: answer</s>`, each image on a line before its text:

    <s>USER: <image>
    what is this? ASSISTANT: a cat</s>USER: what colour? ASSISTANT:

Released weights need this: a message without text ends at its colon, without a space.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenpacker.hf.processing.pictures import decode_base64

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAVA_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
PLAIN = "plain"
CHAT_FORMATS = {"v1": VICUNA_SYSTEM, "vicuna_v1": VICUNA_SYSTEM, "llava_v1": LLAVA_SYSTEM, PLAIN: ""}
"""The original's formats by name, each with its system text."""
BARE = "bare"
"""Vicuna's format without a system text."""

PART_TYPES = ("text", "image", "image_url")
"""Types of the parts of a message, in the notation of transformers and of OpenAI's API."""
IMAGE_SOURCES = ("image", "path", "url", "base64")
"""Keys of an image part that may hold its image."""

AFTER_END_MARK = "USER:"  # what follows the end mark of an answer

_RENDER = """\
{%- macro render(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content -%}
{%- if part.type in ['image', 'image_url'] -%}{{ IMAGE_MARK + '\\n' }}
{%- elif part.type == 'text' -%}{{ part.text }}
{%- else -%}{{ raise_exception("a part of type '" ~ part.type ~ "' cannot be read; use text, image, image_url") }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
"""

_VICUNA = """\
{%- if messages and messages[0].role != 'system' and DEFAULT_SYSTEM -%}{{ DEFAULT_SYSTEM + ' ' }}{%- endif -%}
{%- for message in messages -%}
{%- set text = render(message.content) -%}
{%- if message.role == 'system' -%}{{ text + ' ' }}
{%- elif message.role == 'user' -%}{{ 'USER: ' + text + ' ' if text else 'USER:' }}
{%- elif message.role == 'assistant' and not text -%}{{ 'ASSISTANT:' }}
{%- elif message.role == 'assistant' -%}
{{- 'ASSISTANT: ' -}}{%- generation -%}{{ text + eos_token }}{%- endgeneration -%}
{%- else -%}{{ raise_exception("role '" + message.role + "' is unknown; use system, user or assistant") }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"""

# A caption follows its image directly; a text that is to be continued ends its line.
_PLAIN = """\
{%- for message in messages -%}
{%- set text = render(message.content) -%}
{%- if message.role == 'user' -%}{{ text + '\\n' if loop.last and text else text }}
{%- elif message.role == 'assistant' -%}{%- generation -%}{{ text + '\\n' }}{%- endgeneration -%}
{%- else -%}{{ raise_exception("role '" + message.role + "' is unknown; the plain format has user and assistant") }}
{%- endif -%}
{%- endfor -%}"""


def chat_template(default_system: str | None = None, *, format: str = BARE, image_start_end: bool = False) -> str:
    """The Jinja template of a conversation format.

    Args:
        default_system: opens conversations that bring no system text of their own; None takes the format's.
        format: one of `CHAT_FORMATS`, or `BARE`.
        image_start_end: each image stands between `<im_start>` and `<im_end>`, for models trained with
            `mm_use_im_start_end`.

    Raises:
        ValueError: for an unknown format, and for a system text in the plain one.
    """
    formats = CHAT_FORMATS | {BARE: ""}
    if format not in formats:
        raise ValueError(f"format={format!r} is unknown; use one of {', '.join(formats)}")
    if format == PLAIN and default_system:
        raise ValueError("default_system cannot stand in format='plain', which has captions only; use format='v1'")
    system = formats[format] if default_system is None else default_system
    image_mark = "<im_start><image><im_end>" if image_start_end else "<image>"
    template = _RENDER + (_PLAIN if format == PLAIN else _VICUNA)
    return template.replace("DEFAULT_SYSTEM", json.dumps(system)).replace("IMAGE_MARK", json.dumps(image_mark))


def check_parts(conversation: Any, needs_images: bool = False) -> None:
    """Raises ValueError for a part of a message that cannot be read, in one conversation or several.

    transformers would look for its files first, and drops parts that it does not know, as the templates do.

    Args:
        needs_images: whether an image part must say where its image is; else it may be a mark alone.
    """
    for entry in getattr(conversation, "messages", conversation):
        if isinstance(entry, (list, tuple)) or hasattr(entry, "messages"):
            check_parts(entry, needs_images)
            continue
        content = _value(entry, "content")
        for part in content if isinstance(content, (list, tuple)) else []:
            _check_part(part, needs_images)


def _check_part(part: Any, needs_image: bool) -> None:
    kind = _value(part, "type")
    if kind not in PART_TYPES:
        shown = f"type {kind!r}" if isinstance(kind, str) else f"the form {type(part).__name__} without a type"
        raise ValueError(f"a part of {shown} cannot be read; use one of {', '.join(PART_TYPES)}")
    if kind == "text" and not isinstance(_value(part, "text"), str):
        raise ValueError("a part of type 'text' has no text; give it as a string under 'text'")
    if kind == "image":
        _check_image(part, needs_image)
    if kind == "image_url":
        address = _value(part, "image_url")
        if not isinstance(address if isinstance(address, str) else _value(address, "url"), str):
            raise ValueError(
                "a part of type 'image_url' has no address; give it under 'image_url', as a string or {'url': ...}"
            )


def _check_image(part: Any, needs_image: bool) -> None:
    if all(_value(part, name) is None for name in IMAGE_SOURCES):
        others = [str(name) for name, value in part.items() if value is not None] if isinstance(part, Mapping) else []
        if needs_image or len(others) > 1:
            has = ", ".join(name[:20] for name in others[:5] if name != "type") or "nothing"
            raise ValueError(
                f"a part of type 'image' has {has} beside its type, and so no image; give the image under"
                f" {', '.join(IMAGE_SOURCES)}"
            )
    text = _value(part, "base64")
    if text is None or (isinstance(text, str) and text[:5].lower() == "data:"):
        return
    try:
        decode_base64(text)
    except (TypeError, ValueError):
        raise ValueError(
            "base64 of an image part is no base64; encode the file's bytes, or give a path under 'path'"
        ) from None


def _value(thing: Any, name: str) -> Any:
    """An entry of a dict or an attribute of an object; transformers takes both."""
    return thing.get(name) if isinstance(thing, Mapping) else getattr(thing, name, None)
