"""The conversation formats as Jinja chat templates; the one implementation for training, inference and serving.

The usual one is Vicuna's: a system text, `USER: question ASSISTANT: answer</s>`, each image on a line before its text:

    <s>USER: <image>
    what is this? ASSISTANT: a cat</s>USER: what colour? ASSISTANT:

A message without text ends at its colon, and nothing follows it: released weights need this.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

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
"""What a message's content may be made of, as transformers and OpenAI's API write it."""

AFTER_END_MARK = "USER:"  # what the end mark of an answer is followed by

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


def check_parts(conversation: Any) -> None:
    """Raises ValueError for a part of a message, or of the messages of several conversations, that is no known type.

    transformers would look for its files first, and templates of others drop it.
    """
    for entry in getattr(conversation, "messages", conversation):
        if isinstance(entry, (list, tuple)) or hasattr(entry, "messages"):
            check_parts(entry)
            continue
        content = _value(entry, "content")
        for part in content if isinstance(content, (list, tuple)) else []:
            kind = _value(part, "type")
            if kind not in PART_TYPES:
                shown = f"type {kind!r}" if isinstance(kind, str) else f"the form {type(part).__name__} without a type"
                raise ValueError(f"a part of {shown} cannot be read; use one of {', '.join(PART_TYPES)}")


def _value(thing: Any, name: str) -> Any:
    """Of a dict or of an object, both of which transformers takes."""
    return thing.get(name) if isinstance(thing, Mapping) else getattr(thing, name, None)
