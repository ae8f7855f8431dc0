"""Requests and answers of OpenAI's chat completions, and what is wrong with a request in one sentence.

A field that is not here is an error, never ignored. The fields below "accepted" cannot change an answer, or must have
the value that changes nothing, so that clients that always send them work.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import from_json

from tokenpacker.text import did_you_mean

SEED = 2**63  # torch's generators take no larger ones
# Of other servers, or of OpenAI's older versions. A field of a similar name is not what they mean.
FOREIGN = (
    *("top_k", "min_p", "min_tokens", "top_logprobs", "prompt_logprobs", "repetition_penalty", "length_penalty"),
    *("best_of", "echo", "functions", "function_call", "stop_token_ids", "mm_processor_kwargs"),
)
MAX_VALUES = 20_000  # in a body; each wrong one costs a kilobyte to describe
MAX_COMMAS = 500_000  # in a body, those of its texts included; a bound for the values before they are read

Neutral = Annotated[float | None, Field(ge=0, le=0)]
Nothing = Annotated[list[Any] | None, Field(max_length=0)]
StopText = Annotated[str, Field(min_length=1, max_length=200)]


def _off(value: bool) -> bool:
    if value:
        raise ValueError("must be false")
    return value


# Not Literal[False], which takes 0 as well.
Off = Annotated[bool, AfterValidator(_off), WithJsonSchema({"type": "boolean", "const": False})]


class RequestError(ValueError):
    """A request that is refused, in the terms of OpenAI's errors.

    Args:
        status: of HTTP.
        param: the field, such as `messages[0].content`.
        code: a word for programs.
        retry_after_s: when to try again.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        retry_after_s: int | None = None,
    ):
        super().__init__(message)
        self.message, self.param, self.status, self.code, self.retry_after_s = (
            message,
            param,
            status,
            code,
            retry_after_s,
        )

    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class TextPart(_Strict):
    """Text of a message."""

    type: Literal["text"]
    text: str


class ImageAddress(_Strict):
    """Where an image is. `detail` has no "low": `scale_factor` and `max_image_tokens` say how many tokens it gets."""

    url: str
    detail: Literal["auto", "high"] | None = None


class ImagePart(_Strict):
    """An image of a message: a `data:` address with base64, or an http(s) address of an allowed host."""

    type: Literal["image_url"]
    image_url: str | ImageAddress

    @property
    def address(self) -> str:
        """The address in either form."""
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


class SystemMessage(_Strict):
    """What the assistant is told before the conversation."""

    role: Literal["system", "developer"]
    content: str | list[TextPart]


class UserMessage(_Strict):
    """A question, with its images where they belong."""

    role: Literal["user"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]


class AssistantMessage(_Strict):
    """An earlier answer. It may hold the empty fields that clients keep of it."""

    role: Literal["assistant"]
    content: str | list[TextPart]
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Nothing = None
    annotations: Nothing = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(_Strict):
    """What a stream holds beside the answers."""

    include_usage: bool | None = None
    include_obfuscation: Off | None = None


class TextFormat(_Strict):
    """Plain text, the only form of answers."""

    type: Literal["text"]


class ChatRequest(_Strict):
    """Body of `POST /v1/chat/completions`. `scale_factor` and `max_image_tokens` are extensions."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    seed: Annotated[int | None, Field(ge=-SEED, lt=SEED)] = None
    stop: StopText | list[StopText] | None = None
    n: Annotated[int | None, Field(ge=1)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    scale_factor: Literal["auto"] | Annotated[int, Field(ge=1)] | None = None
    max_image_tokens: Annotated[int | None, Field(ge=1)] = None

    # accepted
    frequency_penalty: Neutral = None
    presence_penalty: Neutral = None
    logit_bias: Annotated[dict[str, Any] | None, Field(max_length=0)] = None
    logprobs: Off | None = None
    metadata: dict[str, str] | None = None
    modalities: list[Literal["text"]] | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    response_format: TextFormat | None = None
    safety_identifier: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Off | None = None
    tools: Nothing = None
    tool_choice: Literal["none", "auto"] | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        lengths = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(lengths) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options need stream=true; give both or neither")
        return self


class PromptDetails(BaseModel):
    """Of the prompt: tokens of images, separators included, and those of them that were in the cache."""

    image_tokens: int
    cached_tokens: int


class UsageModel(BaseModel):
    """Counts of tokens; those of all answers together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class AnswerMessage(BaseModel):
    """The text of an answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class Choice(BaseModel):
    """One of `n` answers."""

    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None


class ChatCompletion(BaseModel):
    """Answer of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: UsageModel


class ErrorFields(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The form of every error."""

    error: ErrorFields


class ModelCard(BaseModel):
    """A model that the server has."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """Answer of `GET /v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]


def read_json(body: bytes) -> Any:
    """The content of a request. Without NaN and Infinity, and not nested beyond about 200 levels.

    Raises:
        RequestError: if the body is no such JSON, and for more than `MAX_VALUES` values.
    """
    try:
        content = None if body.count(b",") > MAX_COMMAS else [from_json(body, allow_inf_nan=False)]
    except ValueError as error:
        if "recursion" in str(error):
            raise RequestError("the body is nested too deeply", code="invalid_json") from None
        raise RequestError("the body is not valid JSON in UTF-8", code="invalid_json") from None
    if content is None or not _are_few(content):
        raise RequestError(f"the body has more than {MAX_VALUES:,} values; send fewer parts", code="limit_exceeded")
    return content[0]


def _are_few(values: list[Any]) -> bool:
    """Whether a body has at most `MAX_VALUES` values, those within others included."""
    rest, count = [values], 0
    while rest and count <= MAX_VALUES:
        inside = rest.pop()
        count += len(inside)
        rest += [list(value.values()) if isinstance(value, dict) else value for value in inside if _holds(value)]
    return count <= MAX_VALUES


def _holds(value: Any) -> bool:
    return isinstance(value, (dict, list))


def check_request(body: Any) -> ChatRequest:
    """The request in a body. Raises RequestError, which names the field and repeats no value."""
    try:
        return ChatRequest.model_validate(body)
    except ValidationError as invalid:
        errors = invalid.errors(include_url=False, include_input=False)
        # Of a field with several forms, all are tried; the one that went furthest is the one that was meant.
        error = max(errors, key=lambda entry: len(_path(body, entry)))
        raise _refusal(error, _path(body, error)) from None


def _path(body: Any, error: Any) -> list[str | int]:
    """The place of an error in the body. pydantic's location also names the forms that it tried, which are left out."""
    path, value = [], body
    for step in error["loc"]:
        is_inside = step in value if isinstance(value, dict) else isinstance(value, list) and isinstance(step, int)
        if is_inside:
            value = value[step]
            path.append(step)
    return [*path, *error["loc"][-1:]] if error["type"] == "missing" else path


def _refusal(error: Any, path: list[str | int]) -> RequestError:
    name = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")
    name = " ".join(name.split())
    name = name if len(name) <= 80 else f"{name[:77]}..."
    rule, code = re.sub(r"^\w+ should", "must", error["msg"]), "invalid_value"
    if error["type"] == "extra_forbidden":
        known = ChatRequest.model_fields if len(path) == 1 else ()
        meant = "" if path[-1] in FOREIGN else did_you_mean(str(path[-1]), known)
        meant = meant or "; leave it out"
        rule, code = f"is not supported{meant}", "unknown_parameter"
    elif error["type"] == "too_long" and error["ctx"]["max_length"] == 0:
        rule, code = "is not supported; leave it out", "unsupported_parameter"
    elif error["type"] in ("too_short", "string_too_short"):  # all lower limits of lengths are 1
        rule = "must not be empty"
    elif error["type"] == "missing":
        rule, code = "is missing", "missing_required_parameter"
    elif error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        rule = "must be an object"
    elif error["type"].startswith("union_tag"):
        tags = error.get("ctx", {}).get("expected_tags", "")
        name += f".{error['ctx']['discriminator']}".replace("'", "")
        rule = f"must be one of {tags}" if tags else "is missing"
    elif path == ["scale_factor"]:
        rule = "must be a whole number of at least 1, or 'auto'"
    elif path[-1:] == ["detail"]:
        rule += "; max_image_tokens says how many tokens an image may have"
    elif error["type"] == "value_error":
        rule = rule.removeprefix("Value error, ")
    what = name or ("" if error["type"] == "value_error" else "the body")
    return RequestError(f"{what} {rule}".strip(), name or None, code=code)
