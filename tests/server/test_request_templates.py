"""Chat templates that calls bring: what they become, and that none of them holds up or harms the server."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import psutil
import pytest
import tiny
from fastapi import FastAPI
from server import fakes

from hf_paged.disposable import NotStarted, Pool
from hf_paged.server.errors import APIError
from hf_paged.server.text import request_templates
from hf_paged.server.text.model_text import ModelText
from hf_paged.text.templates import render

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "hé"}
ENDLESS = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
LATE = 60.0  # seconds after which a busy machine isn't to blame
TOKENIZER = tiny.tokenizer()


@pytest.fixture(scope="module")
def text() -> Iterator[ModelText]:
    """Tests share it, and its process if none of them ends it."""
    made = ModelText(TOKENIZER)
    yield made
    made.close()


@pytest.fixture
def app(text: ModelText) -> FastAPI:
    made = fakes.application(fakes.FakeEngine(longest=20_000), trust_request_chat_template=True)
    made.state.text = text
    return made


def post(app: FastAPI, **body: Any) -> httpx.Response:
    return fakes.call(app, "POST", CHAT, json={"messages": [USER], **body})


def error_of(response: httpx.Response) -> tuple[int, str, str]:
    error = response.json()["error"]
    return response.status_code, error["param"], error["message"]


async def until(done: Callable[[], bool]) -> None:
    limit = time.monotonic() + LATE
    while not done():
        assert time.monotonic() < limit
        await asyncio.sleep(0.01)


# ------------------------------------------------------------------------------------------------- what they become

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"ü": {}}}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": [7, 1.5e300, null, true]}'}}
LONG = [
    {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "€\U0001f600"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "hm"},
    {"role": "tool", "content": " r ", "tool_call_id": "1"},
    USER,
]
DUMP = "{{ messages | tojson }}{{ tools | tojson }}{{ documents | tojson }}{{ add_generation_prompt }}"
SAME = {
    "everything": (DUMP, {"tools": [TOOL], "documents": [{"title": "t", "text": "ü"}]}),
    "nothing": (DUMP, {}),
    "special tokens": ("{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", {}),
    "options": (
        "{{ bos_token }}{{ a.b[0] }}{{ c }}",
        {"options": {"a": {"b": [2**64 - 1]}, "c": -0.1, "bos_token": "!"}},
    ),
    "parts": ("{% for m in messages %}{% for p in m.content %}{{ p.text }}|{% endfor %}{% endfor %}", {}),
    "no prompt": (tiny.TEMPLATE + " ", {"add_generation_prompt": False}),
    "continued": (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}",
        {"add_generation_prompt": False, "continue_final_message": True},
    ),
    "loops and macros": (
        "{% macro f(x) %}[{{ x }}]{% endmacro %}{% set ns = namespace(n=0) %}"
        "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{% set ns.n = ns.n + 1 %}{{ f(m.role) }}"
        "{% endfor %}{{ ns.n }}{% generation %}g{% endgeneration %}",
        {},
    ),
}
REFUSED = {
    "an error of its own": ("{{ raise_exception('né') }}", {}),
    "an error": ("{{ 1 / 0 }}", {}),
    "a macro that calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", {}),
    "no template": ("{% for", {}),
    "the sandbox": ("{{ messages.__class__.__mro__[1].__subclasses__() }}", {}),
    "continued, and a prompt": ("{{ messages[0].content }}", {"continue_final_message": True}),
    "a name of ours": ("x", {"options": {"tokenize": True}}),
}


async def both(text: ModelText, template: str, given: dict[str, Any]) -> list[Any]:
    """What a template becomes in another process and in a thread of this one: a text, or an error."""
    found: list[Any] = []
    options = {"template_options" if name == "options" else name: value for name, value in given.items()}
    there = text.render(iter(LONG), chat_template=template, **options)
    here = asyncio.to_thread(render, TOKENIZER, LONG, chat_template=template, **given)
    for work in (there, here):
        try:
            found.append(await work)
        except (APIError, ValueError) as error:
            found.append(error)
    return found


@pytest.mark.parametrize("name", SAME)
def test_a_template_becomes_what_it_becomes_in_a_thread(text: ModelText, name: str) -> None:
    there, here = asyncio.run(both(text, *SAME[name]))
    assert isinstance(there, str)
    assert there == here


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_is_refused_as_it_is_in_a_thread(text: ModelText, name: str) -> None:
    there, here = asyncio.run(both(text, *REFUSED[name]))
    assert isinstance(there, APIError)
    assert there.status == 400
    assert there.param == ("chat_template_kwargs" if name == "a name of ours" else "messages")
    if "recursion" not in str(here):  # how the interpreter puts it depends on where the stack ends
        assert there.message == str(here)


def test_a_call_is_answered_over_its_own_template(app: FastAPI) -> None:
    response = post(app, chat_template="{{ messages[0].content }}, {{ x }}", chat_template_kwargs={"x": "y"})
    assert response.status_code == 200
    assert TOKENIZER.decode(list(app.state.engine.asked[0].prompt)) == "hé, y"


def test_the_models_own_templates_need_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pool, "ask", lambda *given: pytest.fail("a process was asked"))
    several = tiny.tokenizer()
    several.chat_template = {"default": "a", "other": "b{{ messages[0].content }}"}
    for tokenizer, template, expected in ((several, "other", "bhé"), (TOKENIZER, tiny.TEMPLATE, "[user]hé[assistant]")):
        made = ModelText(tokenizer)
        assert asyncio.run(made.render([USER], chat_template=template)) == expected
        made.close()


# --------------------------------------------------------------------------------------------------------- limits


def refused(text: ModelText, template: str) -> str:
    """What is said of a template that goes beyond a limit."""
    with pytest.raises(APIError) as raised:
        asyncio.run(text.render([USER], chat_template=template))
    assert (raised.value.status, raised.value.param) == (400, "chat_template")
    return raised.value.message


@pytest.mark.parametrize("template", [ENDLESS, "{{ (7 ** (10 ** 8)) % 2 }}"], ids=["loops", "one step of C"])
def test_a_template_without_an_end_is_ended(app: FastAPI, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_templates, "SECONDS", 0.2)
    response = post(app, chat_template=template)
    assert error_of(response) == (400, "chat_template", "the template takes more than 0.2 s to render")
    monkeypatch.undo()
    assert post(app, chat_template="x").status_code == 200


def test_a_template_without_an_end_leaves_other_calls_answered(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_templates, "SECONDS", 10 * LATE)

    async def run() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:

            def call(**body: Any) -> asyncio.Task[httpx.Response]:
                return asyncio.ensure_future(client.post(CHAT, json={"messages": [USER], **body}))

            endless = [call(chat_template=ENDLESS) for _ in range(2 * request_templates.PROCESSES)]
            others = await asyncio.gather(*(call() for _ in range(8)))
            assert {response.status_code for response in others} == {200}
            assert not any(task.done() for task in endless)
            for task in endless:
                task.cancel()
            await asyncio.gather(*endless, return_exceptions=True)

    asyncio.run(run())


def test_a_template_that_becomes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_templates, "CHARACTERS", 150)
    made = ModelText(TOKENIZER)
    for template in ('{{ "x" * 151 }}', '{{ "x" * 10**7 }}', "{{ raise_exception('x' * 200) }}"):
        assert refused(made, template) == "the template becomes more than 150 characters"
    assert asyncio.run(made.render([USER], chat_template='{{ "x" * 150 }}')) == "x" * 150
    made.close()


@pytest.mark.parametrize("template", [r'{{ "\ud800" }}', r"{{ raise_exception('\ud800') }}"])
def test_what_is_no_unicode_is_refused(text: ModelText, template: str) -> None:
    assert refused(text, template) == "the template writes half of a surrogate pair, which is no Unicode"


def test_a_template_that_takes_too_much_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_templates, "MEMORY", 2**29)
    monkeypatch.setattr(request_templates, "SECONDS", 10 * LATE)
    made = ModelText(TOKENIZER)
    doubling = "{% set ns = namespace(x='x') %}{% for i in range(100) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
    for template in ('{{ "x" * 10**9 }}', doubling):
        assert refused(made, template) == "the template takes more than 0.5 GiB of memory to render"
    made.close()


def test_a_call_does_not_wait_for_others_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_templates, "PROCESSES", 1)
    monkeypatch.setattr(request_templates, "SECONDS", 0.2)
    made = ModelText(TOKENIZER)

    async def run() -> list[Any]:
        first = asyncio.ensure_future(made.render([USER], chat_template=ENDLESS))
        await asyncio.sleep(0)
        monkeypatch.setattr(request_templates, "WAIT", 0.0)
        others = [made.render([USER], chat_template=template) for template in "xy"]
        return await asyncio.gather(first, *others, return_exceptions=True)

    endless, *others = asyncio.run(run())
    assert (endless.status, endless.param) == (400, "chat_template")
    for error in others:
        assert (error.status, error.param, error.code) == (429, "chat_template", "queue_full")
        assert "kept this one waiting for more than 0 s" in error.message
    made.close()


def test_without_a_process_the_call_may_be_tried_again(text: ModelText, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> bytes:
        raise NotStarted("no room")

    monkeypatch.setattr(Pool, "ask", fail)
    with pytest.raises(APIError, match="try again later") as raised:
        asyncio.run(text.render([USER], chat_template="x"))
    assert (raised.value.status, raised.value.param, raised.value.retry_after) == (503, "chat_template", 5)


# ------------------------------------------------------------------------------------------------- calls that are left


def test_a_cancelled_call_ends_its_process(text: ModelText, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_templates, "SECONDS", 10 * LATE)

    async def run() -> None:
        process = await idle(text)
        task = asyncio.ensure_future(text.render([USER], chat_template=ENDLESS))
        await until_it_works(process)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not process.is_running())
        assert await text.render([USER], chat_template="x") == "x"

    asyncio.run(run())


def test_a_client_that_leaves_ends_its_process(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_templates, "SECONDS", 10 * LATE)
    leaves = asyncio.Event()

    async def run() -> None:
        process = await idle(app.state.text)
        call = asyncio.ensure_future(sent(app, {"messages": [USER], "chat_template": ENDLESS}, leaves.wait))
        await until_it_works(process)
        leaves.set()
        await call
        await until(lambda: not process.is_running())

    asyncio.run(run())


def test_a_call_that_is_cancelled_while_it_waits_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_templates, "PROCESSES", 1)
    made = ModelText(TOKENIZER)
    asked: list[bytes] = []
    may_end = threading.Event()

    def ask(pool: Pool, frame: bytes, *given: Any) -> bytes:
        asked.append(frame)
        may_end.wait(LATE)
        return b"\x92\xa4text\xa1x"

    monkeypatch.setattr(Pool, "ask", ask)

    async def run() -> None:
        first = asyncio.ensure_future(made.render([USER], chat_template="1"))
        await until(lambda: len(asked) == 1)
        second = asyncio.ensure_future(made.render([USER], chat_template="2"))
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        may_end.set()
        assert await first == "x"
        assert await made.render([USER], chat_template="3") == "x"

    asyncio.run(run())
    assert len(asked) == 2
    made.close()


async def idle(text: ModelText) -> psutil.Process:
    """A process that waits for the next template."""
    assert await text.render([USER], chat_template="x") == "x"
    return psutil.Process(text._request_templates._processes._idle[-1]._process.pid)


async def until_it_works(process: psutil.Process) -> None:
    before = sum(process.cpu_times()[:2])
    await until(lambda: sum(process.cpu_times()[:2]) > before + 0.1)


async def sent(app: FastAPI, body: dict[str, Any], leaves: Callable[[], Awaitable[Any]]) -> None:
    """Make a call whose client leaves."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": CHAT,
        "raw_path": CHAT.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("localhost", 80),
    }
    messages = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])

    async def receive() -> dict[str, Any]:
        for message in messages:
            return message
        await leaves()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None: ...

    await app(scope, receive, send)
