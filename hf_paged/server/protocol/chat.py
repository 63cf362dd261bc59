"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from hf_paged.server.protocol.common import Bool, Int, Sampled, Str, Strict, Usage


class TextPart(Strict):
    """A part of a message; only text is understood."""

    type: Literal["text"]
    text: Str


class FunctionCall(Strict):
    """A call of a function, its arguments as JSON text."""

    name: Str
    arguments: Str


class ToolCall(Strict):
    """A call that an assistant's message made."""

    id: Str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Strict):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Str | list[TextPart] | None = None
    name: Str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Str | None = None
    refusal: Str | None = None
    reasoning_content: Str | None = None

    @model_validator(mode="after")
    def _has_something(self) -> Message:
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.refusal)):
            raise ValueError(f"a message of the role {self.role!r} needs content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only a message of the role 'assistant' has tool_calls")
        return self


class FunctionDefinition(Strict):
    """A function that may be called."""

    name: Str = Field(min_length=1, max_length=128)
    description: Str | None = None
    parameters: dict[str, Any] | None = None
    strict: Bool | None = Field(None, description="Held to with tool_choice 'required' or a named function.")


class Tool(Strict):
    """Something that may be called."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Strict):
    """A function by name."""

    name: Str


class NamedTool(Strict):
    """The one that has to be called."""

    type: Literal["function"] = "function"
    function: NamedFunction


class ChatRequest(Sampled):
    """A conversation to be answered."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Int | None = Field(None, ge=1, le=2**31)
    max_tokens: Int | None = Field(None, ge=1, le=2**31, description="The old name of max_completion_tokens.")
    logprobs: Bool | None = False
    top_logprobs: Int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: Bool | None = True
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        None, description="Handed to the chat template, if it knows it."
    )
    modalities: list[Literal["text"]] | None = None
    add_generation_prompt: Bool = True
    continue_final_message: Bool = False
    add_special_tokens: Bool = Field(False, description="The template writes them already.")
    echo: Literal[False] | None = Field(None, description="Use continue_final_message, or /v1/completions.")
    documents: list[dict[str, Any]] | None = None
    chat_template: Str | None = Field(None, description="Needs --trust-request-chat-template.")
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> ChatRequest:
        if self.add_generation_prompt and self.continue_final_message:
            raise ValueError("continue_final_message needs add_generation_prompt=false")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        names = [tool.function.name for tool in self.tools or []]
        if self.tool_choice not in (None, "none", "auto") and not names:
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is not among the tools")
        return self


class TopLogprob(BaseModel):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(TopLogprob):
    """The same, with the likeliest ones at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of a choice's tokens, of the raw distribution."""

    content: list[TokenLogprob] | None = None
    refusal: None = None


class AnsweredFunction(BaseModel):
    """A call as the model made it."""

    name: str
    arguments: str


class AnsweredToolCall(BaseModel):
    """A call as the model made it."""

    id: str
    type: Literal["function"] = "function"
    function: AnsweredFunction


class ChatMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    refusal: None = None
    tool_calls: list[AnsweredToolCall] | None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatResponse(BaseModel):
    """The answers."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    prompt_token_ids: list[int] | None = None
