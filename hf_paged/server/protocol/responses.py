"""POST /v1/responses, without a memory of earlier ones."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from hf_paged.server.protocol.chat import NamedTool, Tool
from hf_paged.server.protocol.common import Bool, Int, Shared, Str, Strict


class InputText(Strict):
    """Text of a message; what an answer said may be handed back as it came."""

    type: Literal["input_text", "output_text", "text"]
    text: Str
    annotations: list[Any] | None = Field(None, max_length=0)
    logprobs: list[Any] | None = None


class InputMessage(Strict):
    """A message of the conversation so far."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Str | list[InputText]
    id: Str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class InputCall(Strict):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: Str
    name: Str
    arguments: Str
    id: Str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class InputCallOutput(Strict):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: Str
    output: Str | list[InputText]
    id: Str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class ResponseTool(Strict):
    """A function that may be called."""

    type: Literal["function"]
    name: Str = Field(min_length=1, max_length=128)
    description: Str | None = None
    parameters: dict[str, Any] | None = None
    strict: Bool | None = None

    def as_chat(self) -> Tool:
        """The same, as the chat endpoint has it."""
        return Tool.model_validate({"type": "function", "function": self.model_dump(exclude={"type"})})


class ResponseToolChoice(Strict):
    """The one that has to be called."""

    type: Literal["function"]
    name: Str


class TextFormat(Strict):
    """What the text has to be like."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Str | None = None
    description: Str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: Bool | None = None


class TextOptions(Strict):
    """Options of the text."""

    format: TextFormat | None = None


class Reasoning(Strict):
    """Handed to the chat template, if it knows it."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None


class ResponsesRequest(Shared):
    """Something to be answered."""

    input: Str | list[InputMessage | InputCall | InputCallOutput]
    instructions: Str | None = None
    max_output_tokens: Int | None = Field(None, ge=1, le=2**31)
    text: TextOptions | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    parallel_tool_calls: Bool | None = True
    reasoning: Reasoning | None = None
    metadata: dict[str, Str] | None = Field(None, description="Handed back with the answer.")
    include: list[Literal["message.output_text.logprobs"]] | None = None
    top_logprobs: Int | None = Field(None, ge=0, le=20)
    store: Literal[False] | None = Field(None, description="Nothing is stored.")
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    previous_response_id: None = Field(None, description="Nothing is stored: send the whole conversation.")
    service_tier: Literal["auto", "default"] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> ResponsesRequest:
        names = [tool.name for tool in self.tools or []]
        if self.tool_choice not in (None, "none", "auto") and not names:
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, ResponseToolChoice) and self.tool_choice.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.name!r}, which is not among the tools")
        if self.top_logprobs is not None and not self.include:
            raise ValueError("top_logprobs needs include=['message.output_text.logprobs']")
        return self

    def chat_choice(self) -> str | NamedTool | None:
        """The tool choice, as the chat endpoint has it."""
        if isinstance(self.tool_choice, ResponseToolChoice):
            return NamedTool.model_validate({"type": "function", "function": {"name": self.tool_choice.name}})
        return self.tool_choice


class ResponseBody(BaseModel):
    """The answer. Items of `output` are messages and function calls."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete"]
    error: None = None
    incomplete_details: dict[str, str] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    model: str
    output: list[dict[str, Any]]
    parallel_tool_calls: bool
    previous_response_id: None = None
    store: bool = False
    temperature: float | None = None
    top_p: float | None = None
    text: dict[str, Any] | None = None
    tool_choice: Any
    tools: list[dict[str, Any]]
    truncation: Literal["disabled"] = "disabled"
    metadata: dict[str, str] | None = None
    usage: dict[str, Any] | None = None
