"""Every parameter of the openai package: honoured, taken for it can't change an answer, or refused with a reason."""

from __future__ import annotations

import re
import typing
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from server import fakes
from server.conftest import ServerProcess, events
from server.test_server import error_of

from hf_paged.server.protocol.chat import ChatRequest
from hf_paged.server.protocol.common import Accepted
from hf_paged.server.protocol.completions import CompletionRequest
from hf_paged.server.protocol.refused import REASONS
from hf_paged.server.protocol.responses import ResponsesRequest

USER = {"role": "user", "content": "x"}
MINIMAL: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": [USER]},
    "/v1/responses": {"input": "x"},
}
PARAMETERS = {
    "/v1/completions": (completion_create_params.CompletionCreateParamsNonStreaming, CompletionRequest),
    "/v1/chat/completions": (chat_create_params.CompletionCreateParamsNonStreaming, ChatRequest),
    "/v1/responses": (response_create_params.ResponseCreateParamsNonStreaming, ResponsesRequest),
}
# Values that can't change an answer, for the routes that OpenAI has them on, and for the others.
ANYWHERE: list[dict[str, Any]] = [
    {"metadata": {}},
    {"metadata": {"a": None}},
    {"metadata": {"user": "42", "": ""}},
    {"metadata": {f"key {i}": "v" * 512 for i in range(16)}},
    {"store": True},
    {"store": False},
    *({"service_tier": tier} for tier in ("auto", "default", "flex", "scale", "priority", "fast")),
    {"prompt_cache_key": "k"},
    {"prompt_cache_retention": "24h"},
    {"prompt_cache_retention": "in_memory"},
    {"prompt_cache_options": {"mode": "explicit", "ttl": "30m"}},
    {"safety_identifier": "hash"},
    {"user": "somebody"},
    {"best_of": 1},
    {"use_beam_search": False},
    {"length_penalty": 1},
    {"stream": False},
    {"seed": 1},
]
HARMLESS: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [
        {"n": 1},
        {"n": None},
        {"echo": False},
        {"suffix": ""},
        {"logit_bias": {}},
        {"logit_bias": {"5": None}},
        {"stream_options": {"include_obfuscation": False}},
        *({"reasoning_effort": effort} for effort in ("none", "minimal", "low", "medium", "high", "xhigh", "max")),
        *({"verbosity": verbosity} for verbosity in ("low", "medium", "high")),
    ],
    "/v1/chat/completions": [
        {"n": 1},
        {"n": None},
        {"logprobs": False},
        {"logprobs": False, "top_logprobs": 0},
        {"modalities": ["text"]},
        {"tool_choice": "none"},
        {"tool_choice": "auto"},
        {"tools": []},
        {"functions": []},
        {"functions": [], "function_call": "none"},
        {"function_call": "auto", "tools": None},
        {"chat_template": ""},
        {"parallel_tool_calls": True},
        {"response_format": {"type": "text"}},
        {"prediction": {"type": "content", "content": "much of it"}},
        {"prediction": {"type": "content", "content": [{"type": "text", "text": "much of it"}]}},
        {"stream_options": {"include_obfuscation": False}},
        *({"reasoning_effort": effort} for effort in ("none", "minimal", "low", "medium", "high", "xhigh", "max")),
        *({"verbosity": verbosity} for verbosity in ("low", "medium", "high")),
    ],
    "/v1/responses": [
        {"background": False},
        {"truncation": "disabled"},
        {"max_tool_calls": 3},
        {"image": {"context_compression": "auto"}},
        {"stream_options": {"include_obfuscation": False}},
        {"reasoning": {"effort": "max", "summary": "auto", "context": "auto", "mode": "standard"}},
        {"reasoning": {"generate_summary": "concise"}},
        {"text": {"format": {"type": "text"}, "verbosity": "low"}},
        {"include": []},
        {"access_programs": {}, "background_options": {}, "context_management": []},
        {"include": ["reasoning.encrypted_content", "web_search_call.action.sources"]},
        {"top_logprobs": 0},
        {"tool_choice": "auto", "tools": [], "parallel_tool_calls": False},
    ],
}
# Values that would change an answer, or what comes with it.
REFUSED: dict[str, list[tuple[dict[str, Any], str]]] = {
    "/v1/completions": [
        ({"suffix": "y"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ],
    "/v1/chat/completions": [
        ({"audio": {"voice": "x", "format": "mp3"}}, "audio"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"function_call": "none", "tools": [{"type": "function", "function": {"name": "f"}}]}, "function_call"),
        ({"modalities": ["text", "audio"]}, "modalities.1"),
        ({"moderation": {"model": "x"}}, "moderation"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"reasoning_effort": "some"}, "reasoning_effort"),
        ({"verbosity": 1}, "verbosity"),
        ({"prediction": {"type": "content", "content": 1}}, "prediction.content"),
        ({"prompt_cache_options": {"prewarm": True}}, "prompt_cache_options.prewarm"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"n": 2, "temperature": 0}, "n"),
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
        ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs"),
    ],
    "/v1/responses": [
        ({"access_programs": {"cyber": "standard"}}, "access_programs"),
        ({"background": True}, "background"),
        ({"background_options": {"x": 1}}, "background_options"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"conversation": "c"}, "conversation"),
        ({"image": {"context_compression": "enabled"}}, "image.context_compression"),
        ({"include": ["all"]}, "include.0"),
        ({"moderation": {"model": "x"}}, "moderation"),
        ({"previous_response_id": "r"}, "previous_response_id"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"truncation": "auto"}, "truncation"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "name": "f", "defer_loading": True}]}, "tools.0.defer_loading"),
    ],
}


@pytest.mark.parametrize("path", PARAMETERS)
def test_every_parameter_of_the_package_is_decided_on(path: str) -> None:
    """A parameter that a new release of the package has is found here."""
    params, body = PARAMETERS[path]
    names = set(typing.get_type_hints(params))
    fields = set(body.model_fields)
    assert names - fields - set(REASONS) == set(), "honour them, add them to Accepted, or to REASONS with a reason"
    assert fields & set(REASONS) <= {"prompt"}  # which is a field of completions, and a parameter of responses
    tried = {name for one in [*ANYWHERE, *HARMLESS[path], *(one for one, _ in REFUSED[path])] for name in one}
    for name in (names - fields) | (set(Accepted.model_fields) & names):
        assert name in tried, f"try {name} here"


@pytest.mark.parametrize("path", PARAMETERS)
def test_fields_that_cannot_change_an_answer_are_taken(path: str) -> None:
    engine = fakes.FakeEngine()
    app = fakes.application(engine)

    def asked(extra: dict[str, Any]) -> Any:
        response = fakes.call(app, "POST", path, json={**MINIMAL[path], **extra})
        assert response.status_code == 200, (extra, response.text)
        return list(engine.asked[-1].prompt), engine.asked[-1].params.replace(seed=0), _text_of(response.json())

    plain = asked({})
    for extra in [*ANYWHERE, *HARMLESS[path]]:
        assert asked(extra) == plain, extra
    assert asked({name: value for extra in ANYWHERE for name, value in extra.items()}) == plain


def test_metadata_that_is_null_is_absent() -> None:
    app = fakes.application(fakes.FakeEngine())
    for path in ("/v1/chat/completions", "/v1/responses"):
        body = {**MINIMAL[path], "metadata": {"a": None, "b": "c"}}
        assert fakes.call(app, "POST", path, json=body).json()["metadata"] == {"b": "c"}


def _text_of(body: dict[str, Any]) -> str:
    if "output" in body:
        return body["output"][0]["content"][0]["text"]
    choice = body["choices"][0]
    return choice.get("text") or choice["message"]["content"]


@pytest.mark.parametrize("path", PARAMETERS)
def test_what_cannot_be_honoured_is_refused_with_its_reason(path: str) -> None:
    app = fakes.application(fakes.FakeEngine())
    for extra, param in REFUSED[path]:
        response = fakes.call(app, "POST", path, json={**MINIMAL[path], **extra})
        error = error_of(response)
        assert (response.status_code, error["param"]) == (400, param), (extra, error)
        if param in REASONS:
            assert (error["code"], REASONS[param] in error["message"]) == ("unsupported_parameter", True)


WRONG_SCHEMA = {"type": "object", "properties": {"a": {"type": "mood"}}}
FUNCTION = {"name": "f", "parameters": WRONG_SCHEMA}
ENGINE_REFUSES: list[tuple[str, dict[str, Any], str]] = [
    ("completions", {"structured_outputs": {"json": WRONG_SCHEMA}}, "structured_outputs"),
    ("completions", {"structured_outputs": {"grammar": ""}}, "structured_outputs"),
    ("completions", {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": WRONG_SCHEMA}}},
     "response_format"),
    ("completions", {"allowed_token_ids": [2**31 - 1]}, "allowed_token_ids"),
    ("completions", {"logit_bias": {"256": 1}, "stream": True}, "logit_bias"),
    ("completions", {"prompt": ["x"] * 1024, "n": 128, "temperature": 1}, "n"),
    ("chat/completions", {"tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "required"}, "tools"),
    ("responses", {"tools": [{"type": "function", **FUNCTION}], "tool_choice": "required"}, "tools"),
    ("responses", {"text": {"format": {"type": "json_schema", "name": "n", "schema": WRONG_SCHEMA}}}, "text.format"),
    ("responses", {"input": [{"type": "reasoning"}]}, "input"),
    ("responses", {"max_output_tokens": 2**31}, "max_output_tokens"),
    ("chat/completions", {"max_completion_tokens": 512}, "max_completion_tokens"),
    ("chat/completions", {"max_tokens": 511}, "messages"),
]  # fmt: skip


@pytest.mark.parametrize(("route", "extra", "param"), ENGINE_REFUSES)
def test_what_is_found_out_late_is_named_as_the_client_named_it(
    tiny_server: ServerProcess, route: str, extra: dict[str, Any], param: str
) -> None:
    """By the engine, the structured-output plugin or the template."""
    response = httpx.post(f"{tiny_server.url}/v1/{route}", json={**MINIMAL[f"/v1/{route}"], **extra}, timeout=60)
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, param), error
    if "mood" in error["message"]:
        assert error["message"].startswith(f"{param}{'.json' if param == 'structured_outputs' else ''} can't be kept")


@pytest.mark.parametrize("metadata", ["x", ["a"], {"a": 1}, {"a": ["b"]}, {"k" * 65: "v"}, {"k": "v" * 513},
                                      {str(i): "" for i in range(17)}])  # fmt: skip
def test_metadata_is_checked_as_openai_checks_it(metadata: Any) -> None:
    app = fakes.application(fakes.FakeEngine())
    for path, minimal in MINIMAL.items():
        response = fakes.call(app, "POST", path, json={**minimal, "metadata": metadata})
        assert response.status_code == 400
        assert error_of(response)["param"].startswith("metadata")


def test_what_openai_repeats_is_repeated() -> None:
    app = fakes.application(fakes.FakeEngine())
    told = {"metadata": {"a": "b"}, "service_tier": "priority"}
    chat = {"messages": [USER], **told}
    answer = fakes.call(app, "POST", "/v1/chat/completions", json=chat).json()
    assert (answer["metadata"], answer["service_tier"]) == ({"a": "b"}, "default")
    chunks = events(fakes.call(app, "POST", "/v1/chat/completions", json=chat | {"stream": True}).text)
    assert {chunk["service_tier"] for chunk in chunks} == {"default"}
    plain = fakes.call(app, "POST", "/v1/chat/completions", json={"messages": [USER]}).json()
    assert not {"metadata", "service_tier"} & set(plain)
    repeated = {"prompt_cache_key": "k", "safety_identifier": "s", "user": "u", "max_tool_calls": 2}
    asked = {"input": "x", "reasoning": {"effort": "low"}, **told, **repeated}
    body = fakes.call(app, "POST", "/v1/responses", json=asked).json()
    assert {name: body[name] for name in repeated} == repeated
    assert (body["metadata"], body["service_tier"], body["store"]) == ({"a": "b"}, "default", False)
    assert body["reasoning"] == {"effort": "low"}


def test_a_template_that_knows_them_gets_effort_and_verbosity() -> None:
    engine = fakes.FakeEngine()
    app = fakes.application(engine)
    app.state.text.chat_template = "{{ reasoning_effort }}/{{ verbosity }}"
    for path, extra in (
        ("/v1/chat/completions", {"reasoning_effort": "high", "verbosity": "low"}),
        ("/v1/responses", {"reasoning": {"effort": "high"}, "text": {"verbosity": "low"}}),
    ):
        assert fakes.call(app, "POST", path, json={**MINIMAL[path], **extra}).status_code == 200
        assert tiny.tokenizer().decode(list(engine.asked[-1].prompt)) == "high/low"


# -------------------------------------------------------------------------------------------------------------- unions

IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/x.png"}}
UNIONS: list[tuple[str, dict[str, Any], str, str]] = [
    ("chat", {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, IMAGE]}]},
     "messages.0.content.1", "image_url parts are not supported; only text"),
    ("chat", {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
     "messages.0.content.0", "input_audio parts are not supported"),
    ("chat", {"messages": [USER, {"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]}]},
     "messages.1.content.0", "file parts are not supported"),
    ("chat", {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
     "messages.0.content.0.text", "a valid string"),
    ("chat", {"messages": [{"role": "user", "content": [{"text": "x"}]}]},
     "messages.0.content.0.type", "Field required"),
    ("chat", {"messages": [{"role": "user", "content": ["x"]}]}, "messages.0.content.0", "valid dictionary"),
    ("chat", {"messages": [{"role": "user", "content": {}}]}, "messages.0.content", "a valid string, or a valid list"),
    ("chat", {"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "a valid string, or a valid list"),
    ("chat", {"messages": "x"}, "messages", "a valid list"),
    ("chat", {"messages": [USER], "tool_choice": {"type": "custom", "custom": {}}},
     "tool_choice", "custom tool choices are not supported; only function"),
    ("chat", {"messages": [USER], "tool_choice": {"type": "function", "function": {}}},
     "tool_choice.function.name", "Field required"),
    ("chat", {"messages": [USER], "tool_choice": "any"}, "tool_choice", "'none', 'auto' or 'required'"),
    ("chat", {"messages": [USER], "tools": [{"type": "custom", "custom": {"name": "f"}}]},
     "tools.0", "custom tools are not supported; only function"),
    ("chat", {"messages": [USER], "stop": ["x", 5]}, "stop.1", "a valid string"),
    ("chat", {"messages": [USER], "stop": {"a": 1}}, "stop", "a valid string, or a valid list"),
    ("chat", {"messages": [USER], "logit_bias": {"5": "x"}}, "logit_bias.5", "a valid number"),
    ("completions", {"prompt": [1, 2, "a"]}, "prompt.2", "a valid integer"),
    ("completions", {"prompt": ["a", "b", 1]}, "prompt.2", "a valid string"),
    ("completions", {"prompt": [[1], [2, -3]]}, "prompt.1.1", "greater than or equal to 0"),
    ("completions", {"prompt": {"a": 1}}, "prompt", "a valid string, or a valid list"),
    ("completions", {"prompt": "x", "structured_outputs": {"json": 5}},
     "structured_outputs.json", "a valid dictionary, or a valid string"),
    ("responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
     "input.0.content.0", "input_image parts are not supported"),
    ("responses", {"input": [{"role": "user", "content": "x"}, {"type": "item_reference", "id": "i"}]},
     "input.1", "item_reference is not supported"),
    ("responses", {"input": [{"type": "function_call", "call_id": "c", "name": "f"}]},
     "input.0.arguments", "Field required"),
    ("responses", {"input": [{"type": "function_call_output", "call_id": "c", "output": [{"type": "input_file"}]}]},
     "input.0.output.0", "input_file parts are not supported"),
    ("responses", {"input": 5}, "input", "a valid string, or a valid list"),
    ("responses", {"input": "x", "tools": [{"type": "web_search"}]}, "tools.0", "web_search tools are not supported"),
    ("responses", {"input": "x", "tools": [{"type": "function", "name": "f"}], "tool_choice": {"type": "mcp"}},
     "tool_choice", "mcp tool choices are not supported"),
]  # fmt: skip


@pytest.mark.parametrize(("route", "body", "param", "words"), UNIONS)
def test_of_a_union_the_branch_that_was_meant_is_told(route: str, body: dict[str, Any], param: str, words: str) -> None:
    app = fakes.application(fakes.FakeEngine())
    path = "/v1/chat/completions" if route == "chat" else f"/v1/{route}"
    response = fakes.call(app, "POST", path, json=body)
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, param), error
    assert error["message"].startswith(f"{param}: ")
    assert words in error["message"]


# ----------------------------------------------------------------------------------------------------------- the guide


def test_the_guide_lists_what_is_taken_and_what_is_refused() -> None:
    guide = (Path(__file__).parents[2] / "migration_guide" / "serving.md").read_text()
    for name in {*Accepted.model_fields, *REASONS} - {"use_beam_search", "length_penalty"}:
        assert re.search(rf"`{name}\b", guide), f"serving.md doesn't tell of {name}"


def test_the_servers_seed_makes_calls_repeat() -> None:
    """Calls without a seed get one each: the same ones from servers with the same --seed, in the order of the calls."""

    def seeds(**options: Any) -> list[int | None]:
        engine = fakes.FakeEngine()
        app = fakes.application(engine, **options)
        for path, field in (
            ("/v1/completions", {"prompt": "x"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
            ("/v1/responses", {"input": "x"}),
        ):
            assert fakes.call(app, "POST", path, json={**field, "temperature": 1}).status_code == 200
        return [submission.params.seed for submission in engine.asked]

    first = seeds(seed=5)
    assert len(set(first)) == 3
    assert None not in first
    assert seeds(seed=5) == first
    assert seeds(seed=6) != first
    assert seeds() != seeds()
