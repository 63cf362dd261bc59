"""POST /v1/responses, without a memory of earlier ones."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, Discriminator, Field, Tag, model_validator

from hf_paged.server.protocol.chat import NamedTool, Tool
from hf_paged.server.protocol.common import (
    MOST_TOOLS,
    Bool,
    Effort,
    Int,
    ListOf,
    Metadata,
    Part,
    Shared,
    Str,
    Strict,
    Verbosity,
    constraint_of,
    misfit,
)

Status = Literal["in_progress", "completed", "incomplete"]
Summary = Literal["auto", "concise", "detailed"]


class InputText(Part):
    """Text of a message; what an answer said may be handed back as it came."""

    type: Literal["input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text"]
    annotations: list[Any] | None = Field(None, description="Of an answer: where its text is from.")
    logprobs: list[Any] | None = Field(None, description="Of an answer.")
    parsed: Any = Field(None, description="The text again, as the openai package parses it.")


class Item(Strict):
    """What every item of the input may have, and what changes nothing."""

    id: Str | None = None
    status: Status | None = None
    created_by: Str | None = None


class InputMessage(Item):
    """A message of the conversation so far."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Str | ListOf[InputText]
    phase: Literal["commentary", "final_answer"] | None = None


class Caller(Strict):
    """Who made a call: the model itself."""

    kinds = "callers"
    type: Literal["direct"]


class InputCall(Item):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: Str
    name: Str
    arguments: Str
    namespace: Str | None = Field(None, description="Stands before the name, with a point between.")
    caller: Caller | None = None
    async_: Bool | None = Field(None, validation_alias=AliasChoices("async", "async_"))
    parsed_arguments: Any = Field(None, description="The arguments again, as the openai package parses them.")


class InputCallOutput(Item):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: Str | None = None
    output: Str | ListOf[InputText]
    name: Str | None = None
    namespace: Str | None = None
    caller: Caller | None = None


class InputReasoning(Item):
    """What the model thought before an answer: the template gets its text, or else its summary, with that answer."""

    type: Literal["reasoning"]
    summary: ListOf[InputText] | None = None
    content: ListOf[InputText] | None = None
    encrypted_content: Str | None = Field(None, description="Only OpenAI can read it.")


def _type_of(item: Any) -> str:
    """The type of an input item; one without is a message."""
    return str((item.get("type") if isinstance(item, dict) else getattr(item, "type", None)) or "message")


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputCallOutput, Tag("function_call_output")]
    | Annotated[InputReasoning, Tag("reasoning")],
    Discriminator(_type_of),
]


_FUNCTION = ("name", "description", "parameters", "strict")


class ResponseTool(Strict):
    """A function that may be called."""

    kinds = "tools"
    type: Literal["function"]
    name: Str = Field(min_length=1, max_length=128)
    description: Str | None = None
    parameters: dict[str, Any] | None = None
    strict: Bool | None = None
    allowed_callers: ListOf[Literal["direct"]] | None = None
    defer_loading: Literal[False] | None = None
    async_: Literal[False] | None = Field(None, validation_alias=AliasChoices("async", "async_"))

    def told(self) -> dict[str, Any]:
        """As the answer repeats it."""
        return self.model_dump(include={"type", *_FUNCTION})

    def as_chat(self) -> Tool:
        """The same, as the chat endpoint has it."""
        return Tool.model_validate({"type": "function", "function": self.model_dump(include=set(_FUNCTION))})


class ResponseToolChoice(Strict):
    """The one that has to be called."""

    kinds = "tool choices"
    type: Literal["function"]
    name: Str


class TextFormat(Strict):
    """What the text has to be like."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Str | None = None
    description: Str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: Bool | None = None

    def constraint(self) -> dict[str, Any] | None:
        return constraint_of(self.type, self.schema_)


class TextOptions(Strict):
    """Options of the text."""

    format: TextFormat | None = None
    verbosity: Verbosity | None = Field(None, description="Handed to a chat template that knows it.")


class Reasoning(Strict):
    """How much the model thinks. Its thoughts are no items of the answer, so that a summary of them isn't either."""

    effort: Effort | None = Field(None, description="Handed to a chat template that knows it.")
    summary: Summary | None = None
    generate_summary: Summary | None = None
    context: Literal["auto", "current_turn", "all_turns"] | None = Field(
        None, description="The template chooses what it repeats."
    )
    mode: Literal["standard"] | None = None


class ResponseStreamOptions(Strict):
    """What a stream tells beside the text."""

    include_obfuscation: Literal[False] | None = Field(None, description="Events are not padded.")


class ImageOptions(Strict):
    """Of images, which there are none of."""

    context_compression: Literal["auto", "disabled"] | None = None


LOGPROBS = "message.output_text.logprobs"
# Values of `include`. Only the first has an effect: the others are for tools and inputs that this server lacks.
Includable = Literal[
    "message.output_text.logprobs",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
]


class ResponsesRequest(Shared):
    """Something to be answered."""

    input: Str | ListOf[InputItem]
    instructions: Str | None = None
    max_output_tokens: Int | None = Field(None, ge=1, le=2**31)
    text: TextOptions | None = None
    tools: ListOf[ResponseTool] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    parallel_tool_calls: Bool | None = True
    reasoning: Reasoning | None = None
    include: ListOf[Includable] | None = None
    top_logprobs: Int | None = Field(None, ge=0, le=20)
    max_tool_calls: Int | None = Field(None, ge=0, description="Of built-in tools, which there are none of.")
    stream_options: ResponseStreamOptions | None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    image: ImageOptions | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> ResponsesRequest:
        names = [tool.name for tool in self.tools or []]
        if self.tool_choice not in (None, "none", "auto") and not names:
            raise misfit("tool_choice", "tool_choice needs tools")
        if isinstance(self.tool_choice, ResponseToolChoice) and self.tool_choice.name not in names:
            name = self.tool_choice.name
            raise misfit("tool_choice", f"tool_choice names {name!r}, which is not among the tools")
        if self.top_logprobs and not self.wants_logprobs:
            raise misfit("top_logprobs", f"top_logprobs needs include=[{LOGPROBS!r}]")
        return self

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer tells how likely its tokens were."""
        return LOGPROBS in (self.include or ())

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
    metadata: Metadata | None = None
    background: Literal[False] = False
    max_tool_calls: int | None = None
    prompt_cache_key: str | None = None
    reasoning: dict[str, Any] | None = None
    safety_identifier: str | None = None
    service_tier: Literal["default"] | None = None
    top_logprobs: int | None = None
    user: str | None = None
    usage: dict[str, Any] | None = None
