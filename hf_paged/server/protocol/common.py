"""Fields and answers that several endpoints share."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    StrictBool,
    StrictInt,
    StrictStr,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, PydanticKnownError, core_schema

from hf_paged import strict_json
from hf_paged.server.protocol.refused import asks_for_nothing

# JSON's own types: a number in quotes is not a number.
Int = StrictInt
Bool = StrictBool
Str = StrictStr
Float = Annotated[float, Field(strict=True, allow_inf_nan=False)]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
INT64 = 2**63 - 1

# Most entries of a list that costs time for each token of an answer, or for each choice.
MOST_STOPS = 128
MOST_WORDS = 1024
MOST_BIASES = 4096
MOST_TOOLS = 1024

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Verbosity = Literal["low", "medium", "high"]


def _without_nulls(value: Any) -> Any:
    """An object without its entries that are null."""
    return {name: entry for name, entry in value.items() if entry is not None} if isinstance(value, dict) else value


@dataclasses.dataclass(frozen=True)
class _StopsEarly:
    """Has a list's validation end at its first wrong member: only that is told, and the others may be many."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        assert schema["type"] == "list"
        return {**schema, "fail_fast": True}


T = TypeVar("T")
ListOf = Annotated[list[T], _StopsEarly()]
Word = Annotated[Str, Field(max_length=1024)]


@dataclasses.dataclass(frozen=True)
class _AtMost:
    """Refuses a large object before its entries are looked at; pydantic's own `max_length` comes after them."""

    most: int

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._check, handler(source))

    def _check(self, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > self.most:
            context = {"field_type": "Dictionary", "max_length": self.most, "actual_length": len(value)}
            raise PydanticKnownError("too_long", context)
        return value


_Nulls = BeforeValidator(_without_nulls)
Metadata = Annotated[
    dict[Annotated[Str, Field(max_length=64)], Annotated[Str, Field(max_length=512)]],
    Field(max_length=16),
    _AtMost(16),
    _Nulls,
]


def misfit(field: str, message: str) -> PydanticCustomError:
    """The error of a model's validator, about the one of its fields that doesn't go with the others."""
    return PydanticCustomError("misfit", "{message}", {"message": message, "field": field})


def _nullable(schema: dict[str, Any]) -> None:
    """Have a JSON schema say that every field that may be left out may be null."""
    for name, field in schema.get("properties", {}).items():
        if name not in schema.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()):
            kept = {key: field.pop(key) for key in ("default", "description", "title") if key in field}
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **kept}


class Strict(BaseModel):
    """A request, or a part of one. A field that is null is a field left out; one that it doesn't have is refused.

    Attributes:
        kinds: for a part that has a `type`, what such parts are called. Another type is refused under its name.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), json_schema_extra=_nullable)
    kinds: ClassVar[str] = ""

    @model_validator(mode="before")
    @classmethod
    def _given(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kind = value.get("type")
        if cls.kinds and isinstance(kind, str):
            known = get_args(cls.model_fields["type"].annotation)
            if kind not in known:
                message = f"{kind} {cls.kinds} are not supported; only {', '.join(known)}"
                raise PydanticCustomError("unsupported_type", "{message}", {"message": message})
        return _without_nulls(cls._with_one_unknown(value))

    @classmethod
    def _with_one_unknown(cls, value: dict[str, Any]) -> dict[str, Any]:
        """An object of many entries without those that it doesn't have, but for the first: only that is told."""
        if len(value) <= 2 * len(cls.model_fields):
            return value
        aliases = {field.validation_alias for field in cls.model_fields.values()}
        known = {choice for alias in aliases for choice in getattr(alias, "choices", (alias,))} | {*cls.model_fields}
        unknown = next((name for name, entry in value.items() if name not in known and entry is not None), None)
        return {name: value[name] for name in value if name in known or name == unknown}


class StreamOptions(Strict):
    """What a stream tells beside the text."""

    include_usage: Bool | None = Field(None, description="A last chunk with the token counts.")
    continuous_usage_stats: Bool | None = Field(None, description="Token counts in every chunk.")
    include_obfuscation: Literal[False] | None = Field(None, description="Chunks are not padded.")


class StructuredOutputs(Strict):
    """vLLM's `structured_outputs`: exactly one of these."""

    json_: dict[str, Any] | Str | None = Field(None, alias="json")
    regex: Str | None = None
    choice: ListOf[Str] | None = None
    grammar: Str | None = None
    json_object: Bool | None = None

    @field_validator("json_")
    @classmethod
    def _schema_is_json(cls, value: dict[str, Any] | str | None) -> dict[str, Any] | str | None:
        if isinstance(value, str):
            strict_json.loads(value)
        return value

    def constraint(self) -> dict[str, Any]:
        return self.model_dump(by_alias=True, exclude_none=True)


class JSONSchema(Strict):
    """The schema of a `response_format`."""

    name: Str
    description: Str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: Bool | None = Field(None, description="The schema is always held to.")


def constraint_of(kind: str, schema: dict[str, Any] | None) -> dict[str, Any] | None:
    """The field of StructuredOutputs that a format asks for, and its value; None: any text will do."""
    if kind == "json_object":
        return {"json_object": True}
    return {"json": schema or {}} if kind == "json_schema" else None


class ResponseFormat(Strict):
    """What the answer has to be like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise misfit("json_schema", "response_format of the type 'json_schema' needs json_schema")
        return self

    def constraint(self) -> dict[str, Any] | None:
        return constraint_of(self.type, None if self.json_schema is None else self.json_schema.schema_)


class CacheBreakpoint(Strict):
    """Where OpenAI's prompt cache may end; here every full block of a prompt is cached."""

    mode: Literal["explicit"] | None = None
    ttl: Literal["30m", "12h"] | None = None


class Part(Strict):
    """A part of a message."""

    kinds = "parts"
    type: str
    text: Str = ""
    refusal: Str | None = Field(None, description="The text of a part of the type 'refusal'.")
    prompt_cache_breakpoint: CacheBreakpoint | None = None

    @model_validator(mode="after")
    def _has_text(self) -> Part:
        name = "refusal" if self.type == "refusal" else "text"
        if name not in self.model_fields_set:
            raise ValueError(f"a part of the type {self.type!r} needs {name}")
        self.text = self.text if self.refusal is None else self.refusal
        return self


class CacheOptions(Strict):
    """Options of OpenAI's prompt cache."""

    mode: Literal["implicit", "explicit"] | None = None
    ttl: Literal["30m", "12h"] | None = None
    comparison_response_id: Str | None = None
    prewarm: Literal[False] | None = Field(None, description="A call is always answered.")


class Accepted(Strict):
    """Fields that OpenAI's clients send, and that can't change an answer here: checked, and used no further."""

    metadata: Metadata | None = Field(None, description="Handed back with the answer.")
    store: Bool | None = Field(None, description="Ignored: nothing is stored.")
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast", "ultrafast"] | None = Field(
        None, description="There is one tier; the answer says 'default'."
    )
    prompt_cache_key: Str | None = Field(None, description="Every prompt is looked up in the prefix cache.")
    prompt_cache_options: CacheOptions | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    safety_identifier: Str | None = Field(None, max_length=128)
    best_of: Literal[1] | None = Field(None, description="Only 1; `n` gives several.")
    length_penalty: Literal[1] | None = Field(None, description="Of beam search, which there is not: only 1.")
    use_beam_search: Literal[False] | None = None

    @model_validator(mode="before")
    @classmethod
    def _asked(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: entry for name, entry in value.items() if not asks_for_nothing(name, value)}


class Shared(Accepted):
    """What every generating endpoint honours. Ranges are those of `hf_paged.SamplingParams`."""

    model: Str | None = Field(None, description="One of /v1/models; may be left out.")
    temperature: Float | None = Field(None, ge=0, le=2)
    top_p: Float | None = Field(None, gt=0, le=1)
    top_k: Int | None = Field(None, ge=-1, le=INT64, description="0 and -1: all.")
    min_p: Float | None = Field(None, ge=0, le=1)
    repetition_penalty: Float | None = None
    seed: Int | None = Field(None, ge=-INT64, le=INT64 - 1024)
    stop_token_ids: ListOf[TokenId] | None = Field(None, max_length=MOST_WORDS)
    include_stop_str_in_output: Bool = False
    ignore_eos: Bool = False
    min_tokens: Int = Field(0, ge=0, le=INT64)
    skip_special_tokens: Bool = True
    spaces_between_special_tokens: Bool = True
    truncate_prompt_tokens: Int | None = Field(
        None, ge=-1, le=INT64, description="Keep only this many tokens at the end of the prompt; -1: as many as fit."
    )
    allowed_token_ids: ListOf[TokenId] | None = None
    bad_words: ListOf[Word] | None = Field(None, max_length=MOST_WORDS)
    priority: Int = Field(
        0, ge=-INT64, le=INT64, description="Smaller first, a minute for each level; needs the scheduler 'priority'."
    )
    request_id: Str | None = Field(None, min_length=1, max_length=128, description="Instead of X-Request-Id.")
    cache_salt: Str | None = Field(
        None, min_length=1, description="Only requests of the same salt share cached blocks."
    )
    timeout: Float | None = Field(None, gt=0, description="Seconds after which the call ends with 408.")
    user: Str | None = Field(None, description="Named in the server's logs.")
    stream: Bool | None = False


class Sampled(Shared):
    """What the completion and chat endpoints honour beyond that."""

    n: Int | None = Field(1, ge=1, le=128)
    presence_penalty: Float | None = Field(None, ge=-2, le=2)
    frequency_penalty: Float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[dict[str, Float], _AtMost(MOST_BIASES), _Nulls] | None = Field(
        None, description="Token id -> what is added to its logit."
    )
    stop: Word | Annotated[ListOf[Word], Field(max_length=MOST_STOPS)] | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    prompt_logprobs: Int | None = Field(None, ge=-1, le=20)
    return_token_ids: Bool | None = None
    reasoning_effort: Effort | None = Field(None, description="Handed to a chat template that knows it.")
    verbosity: Verbosity | None = Field(None, description="Handed to a chat template that knows it.")


# -------------------------------------------------------------------------------------------------------------- answers


class Error(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """OpenAI's error body."""

    error: Error


class PromptTokensDetails(BaseModel):
    """Of the prompt's tokens."""

    cached_tokens: int


class Usage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "hf_paged"
    root: str
    max_model_len: int | None = None


class ModelList(BaseModel):
    """The models that are served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "A field is unknown, wrong, or can't be honoured; `param` names it.",
        401: "A valid API key is needed.",
        404: "There is no such model.",
        413: "The body is too large.",
        429: "Too much is waiting; Retry-After says when to come again.",
        500: "The request failed.",
        503: "Starting, or shutting down.",
        408: "The deadline is over.",
    }.items()
}
