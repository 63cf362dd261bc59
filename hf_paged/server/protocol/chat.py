"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from hf_paged.server.protocol.common import (
    MOST_TOOLS,
    Bool,
    Int,
    ListOf,
    Metadata,
    Part,
    Sampled,
    Str,
    Strict,
    Usage,
    misfit,
)


class TextPart(Part):
    """A part of a message; only text is understood."""

    type: Literal["text", "refusal"]


class FunctionCall(Strict):
    """A call of a function, its arguments as JSON text."""

    name: Str
    arguments: Str
    parsed_arguments: Any = Field(None, description="The arguments again, as the openai package parses them.")


class ToolCall(Strict):
    """A call that an assistant's message made."""

    kinds = "calls"
    id: Str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: Int | None = Field(None, description="Of a stream: its place among the calls.")


class Audio(Strict):
    """An answer that was spoken; what it said is its transcript."""

    id: Str | None = None
    data: Str | None = None
    expires_at: Int | None = None
    transcript: Str


class Message(Strict):
    """A message of a conversation: one that was written, or an answer as it came, from OpenAI too."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Str | ListOf[TextPart] | None = None
    name: Str | None = None
    tool_calls: ListOf[ToolCall] | None = None
    tool_call_id: Str | None = None
    refusal: Str | None = None
    reasoning_content: Str | None = None
    function_call: FunctionCall | None = Field(None, description="The old form of a single entry of tool_calls.")
    audio: Audio | None = Field(None, description="Its transcript is the content, where there is no other.")
    annotations: list[Any] | None = Field(None, description="Of OpenAI's answers: where a text is from.")
    parsed: Any = Field(None, description="The content again, as the openai package parses it.")

    @model_validator(mode="after")
    def _fits_together(self) -> Message:
        calls = self.tool_calls or self.function_call
        if self.tool_calls and self.function_call:
            raise ValueError("function_call and tool_calls both make calls; give tool_calls")
        said = self.content is not None or self.audio or (self.role == "assistant" and (calls or self.refusal))
        if not said:
            raise ValueError(f"a message of the role {self.role!r} needs content")
        if self.role != "assistant" and (calls or self.audio):
            raise ValueError(f"only a message of the role 'assistant' has {'tool_calls' if calls else 'audio'}")
        return self


class FunctionDefinition(Strict):
    """A function that may be called."""

    name: Str = Field(min_length=1, max_length=128)
    description: Str | None = None
    parameters: dict[str, Any] | None = None
    strict: Bool | None = Field(None, description="Held to with tool_choice 'required' or a named function.")


class Tool(Strict):
    """Something that may be called."""

    kinds = "tools"
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Strict):
    """A function by name."""

    name: Str


class NamedTool(Strict):
    """The one that has to be called."""

    kinds = "tool choices"
    type: Literal["function"] = "function"
    function: NamedFunction


class Prediction(Strict):
    """What much of the answer will be like; it could make the answer faster, and no other."""

    type: Literal["content"]
    content: Str | ListOf[TextPart]


class ChatRequest(Sampled):
    """A conversation to be answered."""

    messages: ListOf[Message] = Field(min_length=1)
    max_completion_tokens: Int | None = Field(None, ge=1, le=2**31)
    max_tokens: Int | None = Field(None, ge=1, le=2**31, description="The old name of max_completion_tokens.")
    logprobs: Bool | None = False
    top_logprobs: Int | None = Field(None, ge=0, le=20)
    tools: ListOf[Tool] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: Bool | None = True
    prediction: Prediction | None = None
    modalities: ListOf[Literal["text"]] | None = None
    add_generation_prompt: Bool = True
    continue_final_message: Bool = False
    add_special_tokens: Bool = Field(False, description="The template writes them already.")
    echo: Literal[False] | None = Field(None, description="Use continue_final_message, or /v1/completions.")
    documents: ListOf[dict[str, Any]] | None = None
    chat_template: Str | None = Field(None, description="Needs --trust-request-chat-template.")
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> ChatRequest:
        if self.add_generation_prompt and self.continue_final_message:
            raise misfit("continue_final_message", "continue_final_message needs add_generation_prompt=false")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise misfit("max_tokens", "max_tokens and max_completion_tokens differ; give one")
        if self.top_logprobs and not self.logprobs:
            raise misfit("top_logprobs", "top_logprobs needs logprobs=true")
        names = [tool.function.name for tool in self.tools or []]
        if self.tool_choice not in (None, "none", "auto") and not names:
            raise misfit("tool_choice", "tool_choice needs tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            name = self.tool_choice.function.name
            raise misfit("tool_choice", f"tool_choice names {name!r}, which is not among the tools")
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
    metadata: Metadata | None = None
    service_tier: Literal["default"] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    prompt_token_ids: list[int] | None = None
