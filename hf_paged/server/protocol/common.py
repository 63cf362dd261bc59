"""Fields and answers that several endpoints share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

# JSON's own types: a number in quotes is not a number.
Int = StrictInt
Bool = StrictBool
Str = StrictStr
Float = Annotated[float, Field(strict=True, allow_inf_nan=False)]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
INT64 = 2**63 - 1


class Strict(BaseModel):
    """A request, or a part of one: a field that it doesn't have is refused."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class StreamOptions(Strict):
    """What a stream tells beside the text."""

    include_usage: Bool | None = Field(None, description="A last chunk with the token counts.")
    continuous_usage_stats: Bool | None = Field(None, description="Token counts in every chunk.")
    include_obfuscation: Literal[False] | None = Field(None, description="Chunks are not padded.")


class StructuredOutputs(Strict):
    """vLLM's `structured_outputs`: exactly one of these."""

    json_: dict[str, Any] | Str | None = Field(None, alias="json")
    regex: Str | None = None
    choice: list[Str] | None = None
    grammar: Str | None = None
    json_object: Bool | None = None

    def constraint(self) -> dict[str, Any]:
        """The fields that are set."""
        return self.model_dump(by_alias=True, exclude_none=True)


class JSONSchema(Strict):
    """The schema of a `response_format`."""

    name: Str
    description: Str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: Bool | None = Field(None, description="The schema is always held to.")


class ResponseFormat(Strict):
    """What the answer has to be like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None


class Shared(Strict):
    """What every generating endpoint honours. Ranges are those of `hf_paged.SamplingParams`."""

    model: Str | None = Field(None, description="One of /v1/models; may be left out.")
    temperature: Float | None = Field(None, ge=0, le=2)
    top_p: Float | None = Field(None, gt=0, le=1)
    top_k: Int | None = Field(None, ge=-1, le=INT64, description="0 and -1: all.")
    min_p: Float | None = Field(None, ge=0, le=1)
    repetition_penalty: Float | None = Field(None, gt=0)
    seed: Int | None = Field(None, ge=-INT64, le=INT64 - 1024)
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: Bool = False
    ignore_eos: Bool = False
    min_tokens: Int = Field(0, ge=0, le=INT64)
    skip_special_tokens: Bool = True
    spaces_between_special_tokens: Bool = True
    truncate_prompt_tokens: Int | None = Field(
        None, ge=-1, le=INT64, description="Keep the last so many tokens of the prompt; -1: as many as fit."
    )
    allowed_token_ids: list[TokenId] | None = None
    bad_words: list[Str] | None = None
    priority: Int = Field(0, ge=-INT64, le=INT64, description="Smaller runs first; needs the scheduler 'priority'.")
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
    logit_bias: dict[str, Float] | None = Field(None, description="Token id -> what is added to its logit.")
    stop: Str | list[Str] | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    prompt_logprobs: Int | None = Field(None, ge=-1, le=20)
    return_token_ids: Bool | None = None
    length_penalty: Literal[1] | None = Field(None, description="Of beam search, which there is not: only 1.")
    store: Literal[False] | None = Field(None, description="Nothing is stored.")
    service_tier: Literal["auto", "default"] | None = None


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
