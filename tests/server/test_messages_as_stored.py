"""What OpenAI's package sends back, this server takes: messages, output items, null for what isn't set."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
from openai import BaseModel
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage, ParsedChatCompletionMessage
from openai.types.chat.parsed_function_tool_call import ParsedFunctionToolCall
from openai.types.responses import (
    ParsedResponseFunctionToolCall,
    ParsedResponseOutputText,
    Response,
    ResponseFunctionToolCall,
    ResponseFunctionToolCallItem,
    ResponseFunctionToolCallOutputItem,
    ResponseOutputItem,
    ResponseOutputMessage,
    ResponseOutputRefusal,
    ResponseOutputText,
    ResponseReasoningItem,
)
from pydantic_core import PydanticUndefined
from server import fakes
from server.conftest import events
from server.test_server import error_of

USER = {"role": "user", "content": "x"}
TOOLS = [{"type": "function", "function": {"name": "f"}}]
CALL = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'


def app(text: str = "hello", template: str | None = None) -> tuple[Any, fakes.FakeEngine]:
    engine = fakes.FakeEngine(text, longest=2048)
    made = fakes.application(engine)
    if template is not None:
        made.state.text.chat_template = template
    return made, engine


def prompt_of(engine: fakes.FakeEngine) -> str:
    return tiny.tokenizer().decode(list(engine.asked[-1].prompt))


def examples(kind: Any) -> Iterator[Any]:
    """Values of a type of the openai package, one for each member of a union; None is left out."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        yield from examples(arguments[0])
    elif origin in (typing.Union, types.UnionType):
        for one in arguments:
            yield from examples(one) if one is not type(None) else ()
    elif origin is typing.Literal:
        yield from arguments
    elif origin is list:
        yield from ([one] for one in examples(arguments[0]))
    elif origin is dict:
        yield {"key": next(examples(arguments[1]))}
    elif isinstance(kind, type) and issubclass(kind, BaseModel):
        yield filled(kind)
    elif isinstance(kind, typing.TypeVar) or kind in (object, Any):
        yield {"a": None}
    else:
        yield {str: "text", int: 1, float: 0.5, bool: True}[kind]


def filled(kind: type[BaseModel], **fields: Any) -> BaseModel:
    """One of a class with what it has to have, and these fields."""
    needed = {name: field for name, field in kind.model_fields.items() if field.default is PydanticUndefined}
    return kind.construct(**{name: next(examples(field.annotation)) for name, field in needed.items()} | fields)


def variants(kind: type[BaseModel], **fields: Any) -> Iterator[tuple[str, BaseModel]]:
    """One of a class, and one for each of its fields with each of its values."""
    yield "", filled(kind, **fields)
    for name, field in kind.model_fields.items():
        if name not in fields:
            for value in examples(field.annotation):
                yield name, filled(kind, **fields, **{name: value})


def dumps(made: BaseModel) -> Iterator[dict[str, Any]]:
    """The forms in which people keep an answer."""
    yield made.model_dump()
    yield made.model_dump(exclude_none=True)
    yield made.model_dump(exclude_unset=True)
    yield made.model_dump(mode="json", by_alias=True)
    yield made.to_dict()
    yield made.to_dict(mode="json", exclude_unset=False)
    yield json.loads(made.to_json())


# ---------------------------------------------------------------------------------------------------------------- chat


@pytest.mark.parametrize("kind", [ChatCompletionMessage, ParsedChatCompletionMessage])
def test_every_field_of_an_answered_message_is_taken(kind: type[BaseModel]) -> None:
    """A field that a new release of the package has is found here."""
    made, _ = app()
    seen = set()
    for name, message in variants(kind, role="assistant", content="an answer"):
        seen.add(name)
        for form in dumps(message):
            response = fakes.call(made, "POST", "/v1/chat/completions", json={"messages": [USER, form, USER]})
            if any(call.get("type") == "custom" for call in form.get("tool_calls") or []):
                error = error_of(response)
                assert (response.status_code, error["param"]) == (400, "messages.1.tool_calls.0")
                assert "custom calls are not supported; only function" in error["message"]
            else:
                assert response.status_code == 200, (name, form, response.text)
            tokens = fakes.call(made, "POST", "/tokenize", json={"messages": [USER, form]})
            assert tokens.status_code == response.status_code
    assert seen >= set(kind.model_fields) - {"role", "content"}


def test_what_an_old_or_spoken_message_says_is_honoured() -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}{{ m.name }}]{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments.x }}{% endfor %}{% endfor %}"
    )
    made, engine = app(template=template)
    old = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 7}'}}
    result = {"role": "function", "name": "f", "content": "r"}
    spoken = {
        "role": "assistant",
        "content": None,
        "audio": {"id": "a", "data": "", "expires_at": 1, "transcript": "T"},
    }
    refused = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
    messages = [USER, old, result, spoken, refused, USER]
    assert fakes.call(made, "POST", "/v1/chat/completions", json={"messages": messages}).status_code == 200
    assert prompt_of(engine) == "[user]x[assistant]f7[toolf]r[assistant]T[assistant]No.[user]x"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "assistant", "audio": {"id": "audio_1"}}, "messages.0.audio.transcript"),
        ({"role": "user", "content": "x", "audio": {"id": "a", "transcript": "t"}}, "messages.0"),
        ({"role": "user", "content": "x", "function_call": {"name": "f", "arguments": "{}"}}, "messages.0"),
        ({"role": "assistant", "function_call": {"name": "f"}}, "messages.0.function_call.arguments"),
        ({"role": "assistant", "content": "x", "mood": "good"}, "messages.0.mood"),
        ({"role": "assistant", "content": "x", "prefix": True}, "messages.0.prefix"),
        ({"role": "assistant", "content": [{"type": "text"}]}, "messages.0.content.0"),
        ({"role": "assistant", "content": [{"type": "text", "text": "x", "weight": 2}]}, "messages.0.content.0.weight"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
         "messages.0.tool_calls.0.function.arguments"),
    ],
)  # fmt: skip
def test_values_of_a_message_that_could_change_an_answer_are_refused(message: dict[str, Any], param: str) -> None:
    made, _ = app()
    response = fakes.call(made, "POST", "/v1/chat/completions", json={"messages": [message]})
    assert (response.status_code, error_of(response)["param"]) == (400, param)


@pytest.mark.parametrize("text", ["hello", f"Hm.{CALL}{CALL}", CALL])
def test_this_servers_own_answers_are_taken(text: str) -> None:
    """Whole, and put together from a stream, by the package and by hand."""
    made, _ = app(text)
    body = {"messages": [USER], "tools": TOOLS, "metadata": {"a": "b"}, "service_tier": "flex"}
    answered = fakes.call(made, "POST", "/v1/chat/completions", json=body)
    answer = ChatCompletion.model_validate(answered.json())
    assert (answer.metadata, answer.service_tier) == ({"a": "b"}, "default")
    streamed = fakes.call(made, "POST", "/v1/chat/completions", json=body | {"stream": True})
    state = ChatCompletionStreamState(input_tools=TOOLS)
    by_hand: dict[str, Any] = {"content": "", "tool_calls": []}
    for event in events(streamed.text):
        state.handle_chunk(ChatCompletionChunk.model_validate(event))
        delta = event["choices"][0]["delta"]
        by_hand["role"] = delta.get("role", "assistant")
        by_hand["content"] += delta.get("content") or ""
        by_hand["tool_calls"] += delta.get("tool_calls", [])
    final = state.get_final_completion().choices[0].message
    by_hand["content"] = by_hand["content"] or None
    stored = [*dumps(answer.choices[0].message), *dumps(final), by_hand, answered.json()["choices"][0]["message"]]
    for message in stored:
        results = [
            {"role": "tool", "tool_call_id": call["id"], "content": "r"} for call in message.get("tool_calls") or []
        ]
        again = {"messages": [USER, message, *results, USER], "tools": TOOLS}
        response = fakes.call(made, "POST", "/v1/chat/completions", json=again)
        assert response.status_code == 200, (message, response.text)


def test_parsed_calls_are_taken() -> None:
    made, _ = app()
    for _, call in variants(ParsedFunctionToolCall, type="function"):
        message = filled(ParsedChatCompletionMessage, role="assistant", tool_calls=[call])
        for form in dumps(message):
            response = fakes.call(made, "POST", "/v1/chat/completions", json={"messages": [USER, form]})
            assert response.status_code == 200, (form, response.text)


# ----------------------------------------------------------------------------------------------------------- responses

ITEMS = {
    "message": (ResponseOutputMessage, {"type": "message", "role": "assistant"}),
    "function_call": (ResponseFunctionToolCall, {"type": "function_call", "arguments": "{}"}),
    "a stored function_call": (ResponseFunctionToolCallItem, {"type": "function_call", "arguments": "{}"}),
    "a parsed function_call": (ParsedResponseFunctionToolCall, {"type": "function_call", "arguments": "{}"}),
    "function_call_output": (ResponseFunctionToolCallOutputItem, {"type": "function_call_output"}),
    "reasoning": (ResponseReasoningItem, {"type": "reasoning"}),
}
UNSUPPORTED = ("program", "input_image", "input_file")  # what a field of such an item may hold, and text is not


@pytest.mark.parametrize("which", ITEMS)
def test_every_field_of_an_output_item_is_taken(which: str) -> None:
    made, _ = app()
    kind, fields = ITEMS[which]
    seen = set()
    for name, item in variants(kind, **fields):
        for form in dumps(item):
            body = {"input": [{"role": "user", "content": "x"}, form]}
            response = fakes.call(made, "POST", "/v1/responses", json=body)
            if any(f'"type": "{unsupported}"' in json.dumps(form) for unsupported in UNSUPPORTED):
                assert response.status_code == 400
                assert error_of(response)["param"].startswith(f"input.1.{name}")
                assert "not supported; only" in error_of(response)["message"]
                continue
            assert response.status_code == 200, (name, form, response.text)
            seen.add(name)
    assert seen >= set(kind.model_fields) - set(fields)


@pytest.mark.parametrize("kind", [ResponseOutputText, ResponseOutputRefusal, ParsedResponseOutputText])
def test_every_field_of_a_part_of_an_output_message_is_taken(kind: type[BaseModel]) -> None:
    made, _ = app()
    for name, part in variants(kind):
        for form in dumps(part):
            message = {"id": "m", "type": "message", "role": "assistant", "status": "completed", "content": [form]}
            response = fakes.call(made, "POST", "/v1/responses", json={"input": [message]})
            assert response.status_code == 200, (name, form, response.text)


def test_items_of_other_kinds_are_refused_by_name() -> None:
    made, _ = app()
    known = {"message", "function_call", "function_call_output", "reasoning"}
    seen = set()
    for item in examples(ResponseOutputItem):
        if item.type in known:
            continue
        seen.add(item.type)
        response = fakes.call(made, "POST", "/v1/responses", json={"input": [{**item.model_dump(mode="json")}]})
        error = error_of(response)
        assert (response.status_code, error["param"]) == (400, "input.0")
        assert error["message"].startswith(f"input.0: {item.type} is not supported; supported: message, ")
    assert {"web_search_call", "mcp_call", "custom_tool_call"} <= seen


def test_what_the_template_gets_of_items() -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.reasoning_content }}|{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}{% endfor %}"
    )
    made, engine = app(template=template)
    thought = {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "S"}]}
    deep = thought | {"content": [{"type": "reasoning_text", "text": "T"}], "encrypted_content": "x"}
    said = {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "No"}], "id": "m"}
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "namespace": "n"}
    given = [{"role": "user", "content": "x"}, thought, said, deep, call, thought, {"role": "user", "content": "y"}]
    assert fakes.call(made, "POST", "/v1/responses", json={"input": given}).status_code == 200
    assert prompt_of(engine) == "[user]|x[assistant]S\nT|Non.f[user]|y"


def test_this_servers_own_responses_are_taken() -> None:
    made, _ = app(f"Hm.{CALL}")
    tools = [{"type": "function", "name": "f"}]
    answered = fakes.call(made, "POST", "/v1/responses", json={"input": "x", "tools": tools}).json()
    answer = Response.construct(**answered)  # as the client makes it
    assert [item.type for item in answer.output] == ["message", "function_call"]
    result = {"type": "function_call_output", "call_id": answered["output"][1]["call_id"], "output": "r"}
    for form in dumps(answer):
        body = {"input": [{"role": "user", "content": "x"}, *form["output"], result], "tools": form["tools"]}
        response = fakes.call(made, "POST", "/v1/responses", json=body)
        assert response.status_code == 200, (form, response.text)


@pytest.mark.parametrize("text", ["hello", "", f"Hm.{CALL}{CALL}", CALL])
@pytest.mark.parametrize("finish", ["stop", "length"])
def test_the_items_of_a_stream_are_those_of_its_response_and_are_taken(text: str, finish: str) -> None:
    made, engine = app(text)
    engine.finish = finish
    body = {"input": "x", "tools": [{"type": "function", "name": "f"}], "stream": True}
    told = [json.loads(line[6:]) for line in fakes.call(made, "POST", "/v1/responses", json=body).text.splitlines()
            if line.startswith("data: ")]  # fmt: skip
    items = [one["item"] for one in told if one["type"] == "response.output_item.done"]
    assert items == told[-1]["response"]["output"]
    results = [{"type": "function_call_output", "call_id": item["call_id"], "output": "r"}
               for item in items if item["type"] == "function_call"]  # fmt: skip
    again = fakes.call(
        made, "POST", "/v1/responses", json={"input": [{"role": "user", "content": "x"}, *items, *results]}
    )
    assert again.status_code == 200, again.text


# ---------------------------------------------------------------------------------------------------------------- null


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize"]
)
def test_null_means_absent_in_every_field(path: str) -> None:
    """Of the schema, and of what it refers to; and for a name that nobody knows."""
    made, engine = app()
    schema = made.openapi()
    body = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    fields = schema["components"]["schemas"][body["$ref"].rsplit("/", 1)[1]]
    minimal = {
        "/v1/completions": {"prompt": "x"},
        "/v1/chat/completions": {"messages": [USER]},
        "/v1/responses": {"input": "x"},
        "/tokenize": {"prompt": "x"},
        "/detokenize": {"tokens": [5]},
    }[path]

    def asked(extra: dict[str, Any]) -> Any:
        response = fakes.call(made, "POST", path, json={**extra, **minimal})
        assert response.status_code == 200, (extra, response.text)
        if not engine.asked:
            return response.json()
        params = engine.asked[-1].params.replace(seed=0)
        return params, list(engine.asked[-1].prompt), engine.asked[-1].priority

    plain = asked({})
    for name in fields["properties"]:
        if name not in minimal:
            assert asked({name: None}) == plain, name
            assert {"type": "null"} in fields["properties"][name]["anyOf"], f"the schema says that {name} can't be null"
    assert asked({"name_of_nothing": None, **dict.fromkeys(set(fields["properties"]) - set(minimal))}) == plain


def test_null_means_absent_inside_of_fields() -> None:
    made, _ = app()
    tool = {"type": "function", "x": None, "function": {"name": "f", "strict": None, "parameters": None, "y": None}}
    text = {"type": "text", "text": "x", "prompt_cache_breakpoint": None, "z": None}
    body = {
        "messages": [{"role": "user", "name": None, "content": [text], "tool_calls": None, "anything": None}],
        "tools": [tool],
        "stream_options": {"include_usage": None, "include_obfuscation": None, "other": None},
        "response_format": {"type": "text", "json_schema": None, "other": None},
        "chat_template_kwargs": {"a": None},
        "structured_outputs": None,
    }
    response = fakes.call(made, "POST", "/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    item = {"type": None, "role": "user", "content": [{"type": "input_text", "text": "x", "a": None}], "phase": None}
    body = {"input": [item], "text": {"format": None, "verbosity": None, "a": None}, "reasoning": {"effort": None}}
    response = fakes.call(made, "POST", "/v1/responses", json=body)
    assert response.status_code == 200, response.text


def test_null_for_what_has_to_be_there_is_absent_too() -> None:
    made, _ = app()
    for path, name in (("/v1/completions", "prompt"), ("/v1/chat/completions", "messages"), ("/v1/responses", "input")):
        response = fakes.call(made, "POST", path, json={name: None})
        assert (response.status_code, error_of(response)["param"]) == (400, name)


def test_an_unknown_field_with_a_value_is_refused_wherever_it_is() -> None:
    made, _ = app()
    for value in (0, False, "", [], {}, 1):
        for body, param in (
            ({"messages": [USER], "temprature": value}, "temprature"),
            ({"messages": [{**USER, "mood": value}]}, "messages.0.mood"),
            ({"messages": [USER], "stream_options": {"all": value}}, "stream_options.all"),
        ):
            response = fakes.call(made, "POST", "/v1/chat/completions", json=body)
            error = error_of(response)
            assert (response.status_code, error["param"], error["code"]) == (400, param, "unknown_field")
