"""The bodies of requests: what of OpenAI's API is understood, and what is refused.

A parameter that would change the answer and is not supported may only have the value at which it does nothing. One
that cannot change the answer is accepted and ignored. Any other is an error, so that no wish is silently dropped.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

MAX_STOPS = 16  # OpenAI takes 4, evaluation suites send more
MAX_STOP_LENGTH = 1000
MAX_LOGPROBS = 20
MAX_N = 128
MAX_PROMPTS = 128


def only(*neutral: object) -> AfterValidator:
    """Make the check of a parameter that is not supported: it may be null, or a value at which it does nothing."""

    def check(value: object) -> object:
        if value is not None and value not in neutral:
            raise PydanticCustomError("unsupported", "is not supported here; leave it out")
        return value

    return AfterValidator(check)


def described(as_what: str) -> WrapValidator:
    """Make a union tell one fault, instead of one for each of its members."""

    def check(value: object, handler: ValidatorFunctionWrapHandler) -> object:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("wrong", "must be {what}", {"what": as_what}) from None

    return WrapValidator(check)


Ignored = Any
Count = Annotated[int, Field(ge=1, le=2**31)]
# fail_fast: of a million wrong items, one fault is enough.
TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(fail_fast=True)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stops = Annotated[list[StopText], Field(max_length=MAX_STOPS)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Body):
    include_usage: bool | None = None
    include_obfuscation: Ignored = None


class _Generation(_Body):
    """The parameters that both kinds of completion have."""

    model: str
    max_tokens: int | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63 - MAX_N)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    stop: (
        Annotated[
            StopText | Stops,
            described(f"a string or up to {MAX_STOPS} strings, each of 1 to {MAX_STOP_LENGTH} characters"),
        ]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    presence_penalty: Annotated[Any, only(0)] = None
    frequency_penalty: Annotated[Any, only(0)] = None
    logit_bias: Annotated[Any, only({})] = None

    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionRequest(_Generation):
    prompt: Annotated[
        str
        | Annotated[list[str], Field(fail_fast=True, max_length=MAX_PROMPTS)]
        | TokenIds
        | Annotated[list[TokenIds], Field(fail_fast=True, max_length=MAX_PROMPTS)],
        described(f"a string, a list of token ids, or a list of up to {MAX_PROMPTS} of either kind"),
    ]
    max_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: Annotated[Any, only("")] = None


class TextPart(_Body):
    type: Literal["text"]
    text: str


class Message(_Body):
    """A message to the model, also one of an answer that is sent back as it came."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        str | Annotated[list[TextPart], Field(fail_fast=True)], described("a string or a list of parts of type text")
    ]
    name: Ignored = None
    type: Annotated[Any, only("text")] = None  # lm-eval marks every message so
    refusal: Annotated[Any, only("")] = None
    annotations: Annotated[Any, only([])] = None
    audio: Annotated[Any, only()] = None
    function_call: Annotated[Any, only()] = None
    tool_calls: Annotated[Any, only([])] = None

    def for_template(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Generation):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    response_format: Annotated[Any, only({"type": "text"})] = None
    tools: Annotated[Any, only([])] = None
    tool_choice: Annotated[Any, only("none", "auto")] = None  # without tools they do nothing
    functions: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only("none", "auto")] = None
    modalities: Annotated[Any, only(["text"])] = None
    audio: Annotated[Any, only()] = None
    prediction: Annotated[Any, only()] = None
    reasoning_effort: Annotated[Any, only()] = None
    verbosity: Annotated[Any, only()] = None
    web_search_options: Annotated[Any, only()] = None
    parallel_tool_calls: Ignored = None
