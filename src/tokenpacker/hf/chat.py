"""The conversation format as a Jinja chat template; the one implementation for training, inference and serving.

It is Vicuna's: an optional system text, `USER: question ASSISTANT: answer</s>`, each image on a line before its text:

    <s>USER: <image>
    what is this? ASSISTANT: a cat</s>USER: what colour? ASSISTANT:
"""

from __future__ import annotations

import json

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

_TEMPLATE = """\
{%- macro render(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content -%}
{%- if part.type == 'image' -%}{{ '<image>\\n' }}{%- elif part.type == 'text' -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- if messages and messages[0].role != 'system' and DEFAULT_SYSTEM -%}{{ DEFAULT_SYSTEM + ' ' }}{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{ render(message.content) + ' ' }}
{%- elif message.role == 'user' -%}{{ 'USER: ' + render(message.content) + ' ' }}
{%- elif message.role == 'assistant' -%}
{{- 'ASSISTANT: ' -}}{%- generation -%}{{ render(message.content) + eos_token }}{%- endgeneration -%}
{%- else -%}{{ raise_exception("role '" + message.role + "' is unknown; use system, user or assistant") }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"""


def chat_template(default_system: str = "") -> str:
    """The Jinja template; `default_system` opens conversations that bring no system text of their own."""
    return _TEMPLATE.replace("DEFAULT_SYSTEM", json.dumps(default_system))
