"""POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field, model_validator

from hf_paged.server.protocol.chat import Message, Tool
from hf_paged.server.protocol.common import MOST_TOOLS, Bool, ListOf, Str, Strict, TokenId, misfit


class TokenizeRequest(Strict):
    """A text, or a conversation."""

    model: Str | None = None
    prompt: Str | None = None
    messages: ListOf[Message] | None = Field(None, min_length=1)
    add_special_tokens: Bool | None = Field(None, description="By default for a prompt, and not for messages.")
    add_generation_prompt: Bool = True
    continue_final_message: Bool = False
    tools: ListOf[Tool] | None = Field(None, max_length=MOST_TOOLS)
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: Bool | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise misfit("prompt", "give either prompt or messages")
        if self.add_generation_prompt and self.continue_final_message:
            raise misfit("continue_final_message", "continue_final_message needs add_generation_prompt=false")
        return self


class TokenizeResponse(BaseModel):
    """The ids."""

    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Strict):
    """Ids."""

    model: Str | None = None
    tokens: ListOf[TokenId]


class DetokenizeResponse(BaseModel):
    """Their text."""

    prompt: str
