"""POST /v1/completions."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from hf_paged.server.protocol.common import Bool, Int, ListOf, Sampled, Str, TokenId, Usage


class CompletionRequest(Sampled):
    """Text to be continued."""

    prompt: Str | ListOf[Str] | ListOf[TokenId] | ListOf[ListOf[TokenId]] = Field(
        description="A text, several texts, token ids, or several lists of token ids."
    )
    max_tokens: Int | None = Field(16, ge=1, le=2**31)
    echo: Bool | None = Field(False, description="Begin the text with the prompt.")
    logprobs: Int | None = Field(None, ge=0, le=20)
    add_special_tokens: Bool = True


class CompletionLogprobs(BaseModel):
    """Log-probabilities of a choice's tokens, of the raw distribution."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(BaseModel):
    """One completion."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class CompletionResponse(BaseModel):
    """The completions."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
