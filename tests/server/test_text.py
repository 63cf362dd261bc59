"""Text on both sides of the ids: streams with stop strings, tool calls, templates, texts that are too long."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from server import fakes
from server.conftest import events

from hf_paged import SamplingParams
from hf_paged.server.errors import APIError
from hf_paged.server.messages import Delta, TokenLogprobs
from hf_paged.server.text import model_text
from hf_paged.server.text.forced import CallList, NamedCall
from hf_paged.server.text.model_text import ModelText
from hf_paged.server.text.stream import TextStream
from hf_paged.server.text.tools import ParsedCall, ToolParser
from hf_paged.text.detokenizer import Detokenizer
from hf_paged.text.tokens import TokenTexts

TOKENIZER = tiny.tokenizer()
TOKENS = TokenTexts(TOKENIZER)
EOS = 2


def streamed(text: str, sizes: list[int], finish: str = "length", **params: Any) -> tuple[str, Any, int]:
    """What a stream shows of a text that comes in deltas of these sizes, how it ends, and the tokens that counted."""
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    stream = TextStream(TOKENS, [5], SamplingParams(max_tokens=None, **params), frozenset([EOS]))
    shown, at = "", 0
    for size in [*sizes, len(ids)]:
        tokens, at = ids[at : at + size], at + size
        last = at >= len(ids)
        logprobs = [TokenLogprobs([token], [0.0], [1]) for token in tokens]
        piece = stream.add(Delta("x", tokens=tokens, logprobs=logprobs, finish=finish if last else None))
        assert len(piece.logprobs or []) == len(piece.tokens)
        shown += piece.text
        if piece.finish_reason:
            return shown, piece.stop_reason or piece.finish_reason, stream.num_tokens
    raise AssertionError("it never ended")


@settings(max_examples=60, deadline=None)
@given(st.text("abcü€", max_size=20), st.lists(st.integers(1, 4), max_size=12), st.booleans())
def test_text_is_that_of_all_tokens(text: str, sizes: list[int], keep: bool) -> None:
    assert streamed(text, sizes)[0] == text
    stops = ["ab", "bca", "üa"]
    shown, reason, _ = streamed(text, sizes, stop=stops, include_stop_str_in_output=keep)
    found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    if not found:
        assert (shown, reason) == (text, "length")
        return
    end = min(found)[0]  # the one that is complete first
    at, stop = min((at, stop) for e, at, stop in found if e == end)
    assert (shown, reason) == (text[: at + len(stop) * keep], stop)


def test_stop_strings_count_tokens_and_respect_min_tokens() -> None:
    assert streamed("abcdef", [1] * 6, stop="cd") == ("ab", "cd", 4)
    assert streamed("abcdef", [6], stop="cd") == ("ab", "cd", 4)
    assert streamed("cdefcdef", [1] * 8, stop="cd", min_tokens=3)[0] == "cdef"


def test_what_ends_the_output_is_no_text() -> None:
    ids = [*TOKENIZER.encode("ab", add_special_tokens=False), EOS]
    for params, expected in (({}, "ab"), ({"skip_special_tokens": False}, "ab"), ({"stop_token_ids": [ids[1]]}, "ab")):
        stream = TextStream(TOKENS, [5], SamplingParams(**params), frozenset([EOS]))
        assert stream.add(Delta("x", tokens=ids, finish="stop")).text == expected
    stream = TextStream(TOKENS, [5], SamplingParams(stop_token_ids=[ids[1]]), frozenset([EOS]))
    assert stream.add(Delta("x", tokens=ids[:2], finish="stop")).text == "a"


# ----------------------------------------------------------------------------------------------------------- tool calls

CALL = '{"name": "f", "arguments": {"x": [1, "}"]}}'
TEXTS = {
    f"Let me see.<tool_call>\n{CALL}\n</tool_call> And <tool_call>{CALL}</tool_call>": ("Let me see. And ", 2),
    f"<tool_call>{CALL}": ("", 1),  # cut at its end
    CALL: ("", 1),
    f"<|python_tag|>{CALL}; {CALL}": ("", 2),
    f"[TOOL_CALLS] [{CALL}, {CALL}]": ("", 2),
    '{"name": "f", "parameters": {"x": 1}}': ("", 1),
    '{"name": "unknown", "arguments": {}}': ('{"name": "unknown", "arguments": {}}', 0),
    '<tool_call>{"name": "f"</tool_call>': ('<tool_call>{"name": "f"</tool_call>', 0),
    '{"answer": 42}': ('{"answer": 42}', 0),
    "{ not json": ("{ not json", 0),
    "plain <tool": ("plain <tool", 0),
    "a < b": ("a < b", 0),
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_tool_calls(text: str, size: int) -> None:
    expected, count = TEXTS[text]
    parser = ToolParser(["f", "g"])
    shown, calls = "", []
    for start in range(0, len(text), size):
        piece, found = parser.add(text[start : start + size])
        shown, calls = shown + piece, calls + found
    piece, found = parser.add("", last=True)
    shown, calls = shown + piece, calls + found
    assert (shown, len(calls)) == (expected, count)
    assert all(call.name == "f" and isinstance(json.loads(call.arguments), dict) for call in calls)
    assert len({call.id for call in calls}) == count


def test_forms_of_tool_calls() -> None:
    assert ToolParser(["f"], "json").add(f"<tool_call>{CALL}</tool_call>", last=True)[1] == []
    assert ToolParser(["f"], "hermes").add(CALL, last=True) == (CALL, [])
    assert ToolParser([], "auto").add(CALL, last=True) == (CALL, [])
    assert ParsedCall("f", "{}").body(0)["index"] == 0


TOOLS = [{"type": "function", "function": {"name": "f"}}]

# Model output that Python's JSON decoder, or what comes after it, gives up; all of it is text.
NO_CALLS = {
    "3,000 arrays": "[" * 3000,
    "closed ones": "[" * 3000 + "]" * 3000,
    "objects": '{"a":' * 3000,
    "in a call": '{"name": "f", "arguments": ' + "[" * 3000 + "]" * 3000 + "}",
    "in a call's name": '{"name": ' + "[" * 3000 + "]" * 3000 + "}",
    "behind a mark": "[TOOL_CALLS]" + "[" * 3000,
    "after a call": CALL + "[" * 3000,
    "digits": "[" + "9" * 5000 + "]",
    "hermes": "<tool_call>" + "[" * 3000 + "</tool_call>",
    "hermes, closed": "<tool_call>" + "[" * 3000 + "]" * 3000 + "</tool_call>",
    "hermes, cut": "Hm.<tool_call>" + '{"a":' * 3000,
    "hermes, in a call": '<tool_call>{"name": "f", "arguments": ' + "[" * 3000 + "]" * 3000 + "}</tool_call>",
}


def small(text: str) -> fakes.FakeEngine:
    return fakes.FakeEngine(text, structured=True, longest=20_000)


@pytest.mark.parametrize("kind", NO_CALLS)
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_output_that_no_decoder_takes_is_text(kind: str, choice: str) -> None:
    text = NO_CALLS[kind]
    body = {"tools": TOOLS, "tool_choice": choice}
    chat = {"messages": [{"role": "user", "content": "x"}], **body}
    for form in ("auto", "json", "hermes"):
        app = fakes.application(small(text), tool_parser=form)
        answer = fakes.call(app, "POST", "/v1/chat/completions", json=chat).json()["choices"][0]
        assert (answer["message"]["content"], answer["finish_reason"]) == (text, "stop")
        streamed = events(fakes.call(app, "POST", "/v1/chat/completions", json=chat | {"stream": True}).text)
        assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in streamed) == text
        asked = {"input": "x", "tools": [{"type": "function", "name": "f"}], "tool_choice": choice}
        told = fakes.call(app, "POST", "/v1/responses", json=asked).json()
        assert [part["text"] for item in told["output"] for part in item["content"]] == [text]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("form", ["{}", "<tool_call>{}</tool_call>"])
def test_arguments_of_half_a_surrogate_pair_stay_json(form: str, stream: bool) -> None:
    """Written as an escape it is JSON; as a character no client could be sent it."""
    for written in ('{"x": "a\\ud83d"}', '"{\\"x\\": \\"a\\ud83d\\"}"'):
        text = form.replace("{}", f'{{"name": "f", "arguments": {written}}}')
        body = {"messages": [{"role": "user", "content": "x"}], "tools": TOOLS, "stream": stream}
        response = fakes.call(fakes.application(small(text)), "POST", "/v1/chat/completions", json=body)
        if stream:
            (call,) = gathered([chunk["choices"][0] for chunk in events(response.text)])
        else:
            call = response.json()["choices"][0]["message"]["tool_calls"][0]["function"]
        assert json.loads(call["arguments"]) == {"x": "a\ud83d"}


GROWING = {
    "brackets": ["[[[["],
    "white space": ["    "],
    "an open hermes call": ["<tool_call>", "abcd"],
    "a forced name": ['[{"name": "', "abcd"],
    "a forced name of quotes": ['[{"name": "', '\\"cd'],
    "a forced call without arguments": ['[{"name": "f"', "    "],
    "forced arguments": ['[{"name": "f", "parameters": ["', "abcd"],
}


@pytest.mark.parametrize("kind", GROWING)
def test_a_growing_text_is_not_parsed_again_at_every_token(kind: str) -> None:
    """40,000 tokens; what looks at all of the text for each one takes minutes."""
    *begin, token = GROWING[kind]
    for reader in (ToolParser(["f"]), CallList(["f"])):
        began = time.process_time()
        for piece in [*begin, *[token] * 40_000]:
            reader.add(piece)
        reader.add("", last=True)
        assert time.process_time() - began < 5.0


def test_many_calls_in_one_piece_are_parsed_once() -> None:
    text = f"<tool_call>{CALL}</tool_call>" * 20_000
    began = time.process_time()
    assert len(ToolParser(["f"]).add(text, last=True)[1]) == 20_000
    assert time.process_time() - began < 5.0


@pytest.mark.parametrize("stream", [False, True])
def test_chat_answers_with_tool_calls(stream: bool) -> None:
    text = f"Hm.<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>"
    for parallel, count in ((None, 2), (False, 1)):
        body = {"messages": [{"role": "user", "content": "x"}], "tools": TOOLS, "stream": stream}
        body |= {} if parallel is None else {"parallel_tool_calls": parallel}
        response = fakes.call(fakes.application(fakes.FakeEngine(text)), "POST", "/v1/chat/completions", json=body)
        if stream:
            chunks = [chunk["choices"][0] for chunk in events(response.text)]
            content = "".join(chunk["delta"].get("content") or "" for chunk in chunks)
            calls = [call for chunk in chunks for call in chunk["delta"].get("tool_calls", [])]
            assert [call["index"] for call in calls] == list(range(count))
            reason = chunks[-1]["finish_reason"]
        else:
            choice = response.json()["choices"][0]
            content, calls, reason = (
                choice["message"]["content"],
                choice["message"]["tool_calls"],
                choice["finish_reason"],
            )
        assert (content, len(calls), reason) == ("Hm.", count, "tool_calls")
        assert json.loads(calls[0]["function"]["arguments"]) == {"x": [1, "}"]}


@pytest.mark.parametrize("stream", [False, True])
def test_responses_answer_with_text_and_calls(stream: bool) -> None:
    text = f"Hm.<tool_call>{CALL}</tool_call>"
    body = {"input": "x", "tools": [{"type": "function", "name": "f"}], "stream": stream, "metadata": {"a": "b"}}
    response = fakes.call(fakes.application(fakes.FakeEngine(text)), "POST", "/v1/responses", json=body)
    if stream:
        told = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")]
        assert [event["sequence_number"] for event in told] == list(range(len(told)))
        kinds = [event["type"] for event in told]
        assert kinds.index("response.output_text.done") < kinds.index("response.function_call_arguments.done")
        assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 2
        answer = told[-1]["response"]
    else:
        answer = response.json()
    assert [item["type"] for item in answer["output"]] == ["message", "function_call"]
    assert answer["output"][0]["content"][0]["text"] == "Hm."
    assert (answer["status"], answer["metadata"], answer["store"]) == ("completed", {"a": "b"}, False)


def test_a_forced_call_needs_a_plugin() -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "tools": TOOLS, "tool_choice": "required"}
    response = fakes.call(fakes.application(fakes.FakeEngine()), "POST", "/v1/chat/completions", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tool_choice")
    engine = fakes.FakeEngine(f"[{CALL}]", structured=True)
    answer = fakes.call(fakes.application(engine), "POST", "/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "f"
    constraint = engine.asked[0].params.structured_outputs
    assert constraint is not None
    assert constraint.json["items"]["anyOf"][0]["properties"]["name"] == {"type": "string", "enum": ["f"]}


ARGUMENTS = '{ "x" : [1, "}\\"]{"], "é": {}}'
FORCED = {  # what is written -> whether it was cut, and the arguments of its calls
    f'[{{"name": "f", "parameters": {ARGUMENTS}}}]': (False, [ARGUMENTS]),
    f'\n[ {{ "name":"f" ,\n"parameters" : {ARGUMENTS} }} , {{"name": "f", "parameters": {{}}}} ] ': (
        False,
        [ARGUMENTS, "{}"],
    ),
    '[{"name": "f", "parameters": {"x": "a': (True, ['{"x": "a']),
    '[{"name": "f"': (True, [""]),
    '[{"name": "f", "parameters": {}}, {"na': (True, ["{}"]),
    '[{"name": "f", "parameters": 12}, {"name": "f", "parameters": "a]"}]': (False, ["12", '"a]"']),
    CALL: (False, ['{"x": [1, "}"]}']),  # no constraint would let it pass: a plugin that doesn't keep to the schema
}


def chat_call(text: str, finish: str = "stop", **body: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The choices of a stream's chunks, and that of the answer as one body."""
    found = []
    for stream in (True, False):
        engine = fakes.FakeEngine(text, structured=True)
        engine.finish = finish
        asked = {"messages": [{"role": "user", "content": "x"}], "tools": TOOLS, "stream": stream, **body}
        found.append(fakes.call(fakes.application(engine), "POST", "/v1/chat/completions", json=asked))
    return [chunk["choices"][0] for chunk in events(found[0].text)], found[1].json()["choices"][0]


def gathered(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The calls that a stream's deltas make, put together as clients do."""
    calls: list[dict[str, Any]] = []
    for chunk in chunks:
        for delta in chunk["delta"].get("tool_calls", []):
            if "id" in delta:
                assert (delta["index"], delta["type"]) == (len(calls), "function")
                calls.append({"name": delta["function"]["name"], "arguments": ""})
            else:
                assert set(delta) == {"index", "function"}
            assert delta["index"] == len(calls) - 1
            calls[-1]["arguments"] += delta["function"]["arguments"]
    return calls


@pytest.mark.parametrize("text", FORCED)
@pytest.mark.parametrize("parallel", [True, False])
def test_forced_calls_are_streamed_as_they_are_answered(text: str, parallel: bool) -> None:
    cut, expected = FORCED[text]
    finish = "length" if cut else "stop"
    options = {"tool_choice": "required", "parallel_tool_calls": parallel}
    chunks, choice = chat_call(text, finish, **options)
    message, calls = choice["message"], gathered(chunks)
    assert calls == [{**call["function"]} for call in message["tool_calls"]]
    assert [(call["name"], call["arguments"]) for call in calls] == [
        ("f", a) for a in expected[: None if parallel else 1]
    ]
    assert chunks[-1]["finish_reason"] == choice["finish_reason"] == ("length" if cut else "tool_calls")
    assert message["content"] is None
    assert not "".join(chunk["delta"].get("content") or "" for chunk in chunks)


def test_a_named_call_is_streamed_as_it_is_answered() -> None:
    named = {"type": "function", "function": {"name": "f"}}
    for finish, text in (("stop", ARGUMENTS), ("length", '{"x'), ("length", "")):
        chunks, choice = chat_call(text, finish, tool_choice=named)
        assert gathered(chunks) == [{"name": "f", "arguments": text}]
        assert choice["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": text}
        reason = "tool_calls" if finish == "stop" else "length"
        assert chunks[-1]["finish_reason"] == choice["finish_reason"] == reason


def test_forced_calls_come_as_they_are_generated() -> None:
    """FakeEngine says a character at a time."""
    named = {"type": "function", "function": {"name": "f"}}
    for choice, text in (("required", f'[{{"name": "f", "parameters": {ARGUMENTS}}}]'), (named, ARGUMENTS)):
        reader = (NamedCall("f") if choice is named else CallList(["f"])).add
        pieces = [(character, reader(character)) for character in text]
        begun = next(number for number, (_, (_, _, deltas)) in enumerate(pieces) if deltas)
        assert text[: begun + 1].endswith('"f"' if choice == "required" else ARGUMENTS[0])  # as soon as it is known
        told = [delta.arguments for _, (_, _, deltas) in pieces for delta in deltas if delta.arguments]
        assert told == list(ARGUMENTS)
        chunks, _ = chat_call(text, tool_choice=choice)
        assert sum("tool_calls" in chunk["delta"] for chunk in chunks) >= len(ARGUMENTS) // 2


def test_what_is_no_forced_call_is_text() -> None:
    for text in ("hello", '[{"na', '[{"name": "g", "parameters": {}}]', '[{"name": "\\x", "parameters": {}}]', "{}"):
        chunks, choice = chat_call(text, tool_choice="required")
        assert "".join(chunk["delta"].get("content") or "" for chunk in chunks) == choice["message"]["content"] == text
        assert not gathered(chunks)
        assert chunks[-1]["finish_reason"] == choice["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_responses_answer_with_forced_calls(stream: bool) -> None:
    text = f'[{{"name": "f", "parameters": {ARGUMENTS}}}, {{"name": "f", "parameters": {{}}}}]'
    body = {"input": "x", "tools": [{"type": "function", "name": "f"}], "tool_choice": "required", "stream": stream}
    engine = fakes.FakeEngine(text, structured=True)
    response = fakes.call(fakes.application(engine), "POST", "/v1/responses", json=body)
    told = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")]
    answer = told[-1]["response"] if stream else response.json()
    assert [item["arguments"] for item in answer["output"]] == [ARGUMENTS, "{}"]
    deltas = [event["delta"] for event in told if event["type"] == "response.function_call_arguments.delta"]
    assert deltas == ([ARGUMENTS, "{}"] if stream else [])


# ------------------------------------------------------------------------------------------------------ prompts, limits


def test_a_text_that_is_too_long_is_not_tokenised_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_text, "PIECE", 100)
    seen: list[int] = []
    text = ModelText(TOKENIZER)
    encode = TOKENIZER.encode
    monkeypatch.setattr(TOKENIZER, "encode", lambda t, **options: seen.append(len(t)) or encode(t, **options))
    with pytest.raises(APIError, match="maximum context length is 150"):
        asyncio.run(text.encode("x" * 100_000, special=False, most=150, param="prompt"))
    assert sum(seen) <= 300
    assert len(asyncio.run(text.encode("x" * 150, special=False, most=150, param="prompt"))) == 150


def test_what_the_template_gets() -> None:
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments.x }}{% endfor %};{% endfor %}"
        "{{ tools | length if tools else 0 }}{{ extra }}{{ reasoning_effort }}"
    )
    engine = fakes.FakeEngine()
    app = fakes.application(engine)
    app.state.text.chat_template = template
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 7}'}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "r", "tool_call_id": "1"},
    ]
    body = {"messages": messages, "tools": TOOLS, "chat_template_kwargs": {"extra": "!"}, "reasoning_effort": "low"}
    response = fakes.call(app, "POST", "/v1/chat/completions", json=body)
    assert response.status_code == 200
    assert TOKENIZER.decode(list(engine.asked[0].prompt)) == "system:a\nb;assistant:7;tool:r;1!low"
    fakes.call(app, "POST", "/v1/chat/completions", json=body | {"tool_choice": "none"})
    assert TOKENIZER.decode(list(engine.asked[1].prompt)).endswith(";0!low")
    app.state.text.chat_template = "{{ raise_exception('no') }}"
    response = fakes.call(app, "POST", "/v1/chat/completions", json={"messages": messages})
    assert (response.status_code, "refuses" in response.text) == (400, True)


def test_parameters_reach_the_engine() -> None:
    engine = fakes.FakeEngine(defaults={"temperature": 0.3, "top_k": 7})
    app = fakes.application(engine, default_timeout=9.0, max_queue_seconds=3.0)
    body = {"prompt": [5, 6], "max_tokens": 3, "n": 2, "top_p": 0.5, "stop": "x", "logit_bias": {"7": 1}, "min_p": 0.1}
    assert fakes.call(app, "POST", "/v1/completions", json=body).status_code == 200
    first, second = engine.asked
    params = first.params
    assert (params.temperature, params.top_k, params.top_p, params.min_p, params.n) == (0.3, 7, 0.5, 0.1, 1)
    assert (params.stop, params.logit_bias, params.max_tokens) == (("x",), {7: 1.0}, 3)
    assert params.seed is not None
    assert second.params.seed == params.seed + 1
    assert second.parent is first
    assert first.deadline == pytest.approx(first.record.arrival + 9)
    assert first.queue_deadline == pytest.approx(first.record.arrival + 3)
    assert first.eos == {2}
    greedy = {"prompt": "x", "temperature": 0}
    fakes.call(app, "POST", "/v1/completions", json=greedy)
    assert engine.asked[2].params.seed is None
    chat = {"messages": [{"role": "user", "content": "x"}]}
    fakes.call(app, "POST", "/v1/chat/completions", json=chat)
    asked = engine.asked[3]
    assert asked.params.max_tokens == 128 - len(asked.prompt)  # as many as fit


@pytest.mark.parametrize("skip", [False, True])
def test_decoding_directly_is_decoding(skip: bool) -> None:
    """The Rust tokenizer, asked directly, says what Transformers' `decode` says."""
    ids = [7, 1, *range(3, 200), 2, 90, 2, *range(199, 3, -3)]
    params = SamplingParams(skip_special_tokens=skip)
    direct, called = Detokenizer(TOKENIZER, [5], params), Detokenizer(tiny.tokenizer(), [5], params)
    called._decoder = lambda some: TOKENIZER.decode(some, skip_special_tokens=skip)
    for token in ids:
        assert direct.add([token]) == called.add([token])
