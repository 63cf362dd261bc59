"""Bodies of the allowed size, right or wrong, leave the event loop to others."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from server import fakes
from server.test_server import error_of

from hf_paged import strict_json
from hf_paged.server import heavy
from hf_paged.server.errors import APIError
from hf_paged.server.pace import Pace
from hf_paged.server.text import model_text

LARGEST = 16 * 2**20
STALL = 0.5  # seconds; on an idle machine it is a fifth of that
COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
QUOTED = '"a"'
TOOL = '{"type": "function", "function": {"name": "f"}}'
USER = '{"role": "user", "content": "x"}'


def many(member: str, count: int) -> str:
    return ",".join([member] * count)


def object_of(value: str, count: int) -> str:
    """An object; its keys are numbers."""
    return "{" + ",".join(f'"{i}":{value}' for i in range(count)) + "}"


def chat(fields: str) -> str:
    return f'{{"messages": [{USER}], {fields}}}'


# Name -> route, body, status, and the field that an error names.
BODIES: dict[str, tuple[str, Callable[[], str], int, str | None]] = {
    "5 million ids and a text": (
        COMPLETIONS, lambda: f'{{"prompt": [{many("7", 4_700_000)}, "x"]}}', 400, "prompt"
    ),
    "a million ids and a text": (
        COMPLETIONS, lambda: f'{{"prompt": [{many("7", 10**6)}, "x"]}}', 400, "prompt.1000000"
    ),
    "a million ids": (COMPLETIONS, lambda: f'{{"prompt": [{many("7", 10**6)}]}}', 400, "prompt"),
    "a million floats": (COMPLETIONS, lambda: f'{{"prompt": [{many("1.5", 10**6)}]}}', 400, "prompt"),
    "a million exponents": (COMPLETIONS, lambda: f'{{"prompt": [{many("1e5", 10**6)}]}}', 400, "prompt"),
    "long integers": (COMPLETIONS, lambda: f'{{"prompt": [{many("9" * 4300, 3500)}]}}', 400, "prompt"),
    "one long integer": (COMPLETIONS, lambda: f'{{"prompt": {"9" * 16_000_000}}}', 400, "prompt"),
    "no JSON": (COMPLETIONS, lambda: "x" * 16_000_000, 400, None),
    "spaces": (COMPLETIONS, lambda: " " * 16_000_000, 400, None),
    "1,024 prompts, n=128": (COMPLETIONS, lambda: f'{{"prompt": [{many("[7]", 1024)}], "n": 128}}', 400, "n"),
    "a text of 16 MB": (COMPLETIONS, lambda: f'{{"prompt": "{"é" * 8_000_000}"}}', 400, "prompt"),
    "8 million escapes": (COMPLETIONS, lambda: f'{{"prompt": "{chr(92) * 16_000_000}"}}', 400, "prompt"),
    "300,000 wrong messages": (CHAT, lambda: f'{{"messages": [{many("{}", 300_000)}]}}', 400, "messages"),
    "90,000 wrong messages": (CHAT, lambda: f'{{"messages": [{many("{}", 90_000)}]}}', 400, "messages.0.role"),
    "8,000 right messages": (CHAT, lambda: f'{{"messages": [{many(USER, 8_000)}]}}', 400, "messages"),
    "wrong parts": (
        CHAT,
        lambda: f'{{"messages": [{{"role": "user", "content": [{many("{}", 90_000)}]}}]}}',
        400,
        "messages.0.content.0.type",
    ),
    "300,000 fields": (CHAT, lambda: object_of("1", 300_000), 400, None),
    "45,000 fields": (CHAT, lambda: object_of("1", 45_000), 400, "messages"),
    "300,000 keys": (
        CHAT, lambda: chat(f'"chat_template_kwargs": {object_of("1", 300_000)}'), 400, "chat_template_kwargs"
    ),
    "brackets": (CHAT, lambda: '{"tools": ' + "[" * 15_000_000, 400, "tools.0.0.0.0.0.0.0"),
    "pairs of brackets": (CHAT, lambda: chat(f'"documents": [{many("{}", 2_000_000)}]'), 400, "documents"),
    "nulls": (CHAT, lambda: chat(f'"documents": [{many("null", 1_000_000)}]'), 400, "documents"),
    "brackets in a text": (
        COMPLETIONS,
        lambda: json.dumps({"prompt": "x", "structured_outputs": {"json": f"[{many('[]', 5_000_000)}]"}}),
        400,
        "structured_outputs.json",
    ),
    "logit_bias": (CHAT, lambda: chat(f'"logit_bias": {object_of("1", 45_000)}'), 400, "logit_bias"),
    "wrong logit_bias": (CHAT, lambda: chat(f'"logit_bias": {object_of("[]", 4000)}'), 400, "logit_bias.0"),
    "metadata": (CHAT, lambda: chat(f'"metadata": {object_of("1", 45_000)}'), 400, "metadata"),
    "allowed_token_ids": (CHAT, lambda: chat(f'"allowed_token_ids": [{many("7", 250_000)}]'), 200, None),
    "allowed_token_ids, n=128": (
        CHAT, lambda: chat(f'"n": 128, "allowed_token_ids": [{many("7", 250_000)}]'), 400, "allowed_token_ids"
    ),
    "bad_words": (CHAT, lambda: chat(f'"bad_words": [{many(QUOTED, 90_000)}]'), 400, "bad_words"),
    "a long bad word": (CHAT, lambda: chat(f'"bad_words": ["{"a " * 7_000_000}"]'), 400, "bad_words.0"),
    "stop": (CHAT, lambda: chat(f'"stop": [{many(QUOTED, 90_000)}]'), 400, "stop"),
    "tools": (CHAT, lambda: chat(f'"tools": [{many("{}", 90_000)}]'), 400, "tools.0.type"),
    "right tools": (CHAT, lambda: chat(f'"tools": [{many(TOOL, 10_000)}]'), 400, "tools"),
    "items": (RESPONSES, lambda: f'{{"input": [{many("{}", 90_000)}]}}', 400, "input.0.role"),
    "right items": (RESPONSES, lambda: f'{{"input": [{many(USER, 8_000)}]}}', 400, "input"),
    "token_strs": (
        "/tokenize", lambda: json.dumps({"prompt": "hello " * 40_000, "return_token_strs": True}), 200, None
    ),
    "a text that is too long to count": (
        "/tokenize", lambda: json.dumps({"prompt": "hello " * 2_700_000}), 400, "prompt"
    ),
    "a million ids to text": ("/detokenize", lambda: f'{{"tokens": [{many("77", 10**6)}]}}', 400, "tokens"),
    "ids to text": ("/detokenize", lambda: f'{{"tokens": [{many("77", 260_000)}]}}', 200, None),
}  # fmt: skip


class Ticker:
    """Wakes up often, and keeps for how long it could not.

    Of wall-clock and this process's time the smaller counts: other processes may have the machine's cores.
    """

    def __init__(self) -> None:
        self.longest = 0.0

    async def run(self) -> None:
        wall, own = time.monotonic(), time.process_time()
        while True:
            await asyncio.sleep(0.002)
            before = wall, own
            wall, own = time.monotonic(), time.process_time()
            self.longest = max(self.longest, min(wall - before[0], own - before[1]))


async def post(app: FastAPI, path: str, content: bytes) -> httpx.Response:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
        return await client.post(path, content=content, headers={"Content-Type": "application/json"})


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> Iterator[None]:
    """As in a server: the collector does not walk what was there before the first request."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("name", BODIES)
def test_no_body_holds_up_the_event_loop(name: str) -> None:
    path, make, status, param = BODIES[name]
    content = make().encode()
    assert len(content) <= LARGEST
    engine = fakes.FakeEngine(structured=True)
    engine.most = 1100  # sequences
    app = fakes.application(engine)
    ticker = Ticker()

    async def both() -> httpx.Response:
        task = asyncio.create_task(ticker.run())
        await asyncio.sleep(0.01)
        try:
            return await asyncio.wait_for(post(app, path, content), 60)
        finally:
            await asyncio.sleep(0.01)
            task.cancel()

    began = time.process_time()
    response = asyncio.run(both())
    took = time.process_time() - began
    print(f"{name}: {took:.2f} s, at most {ticker.longest * 1000:.0f} ms in one piece")
    assert response.status_code == status, response.text[:500]
    if status == 400 and param is not None:
        assert error_of(response)["param"] == param, response.text
    assert ticker.longest < STALL
    assert took < 8.0


def test_what_is_too_much_is_named() -> None:
    parts, members = strict_json.MOST_PARTS, strict_json.MOST_MEMBERS
    for inside in (many("7", members), many("1.5", parts - 1)):
        strict_json.loads(f"[{inside}]")
    for member in (QUOTED, "null", "1E5", '{"a":1}', "7"):
        inside = many(member, members if member == "7" else parts - 1)
        text = f'{{"a": {{"b": ["\\\\", "\\"[[", {inside}, {member}]}}, "c": [1]}}'
        with pytest.raises(strict_json.StrictJSONError) as caught:
            strict_json.loads(text)
        assert caught.value.path == ["a"], member
        assert "more than 1" in str(caught.value)


@pytest.mark.parametrize("backslashes", [0, 1, 2, 3, 2**20 - 1, 2**20, 2**20 + 1])
def test_escapes_are_no_ends_of_texts(backslashes: int) -> None:
    """Wherever the pieces, in which they are looked for, end."""
    value = {"a": "\\" * backslashes + '"[' * 100_001, "é": ["\\", '"', "]", "😀"]}
    assert strict_json.loads(json.dumps(value)) == value
    text = json.dumps(value | {"a": "x" * (2**20 - 8) + value["a"], "b": None}, ensure_ascii=False)
    assert strict_json.loads(text)["é"] == value["é"]
    deep = f'{text[:-1]}, "c": {"[" * 128}{"]" * 128}}}'
    with pytest.raises(strict_json.StrictJSONError, match="nested") as caught:
        strict_json.loads(deep)
    assert caught.value.path[0] == "c"


@pytest.mark.parametrize("field", ["stop", "top_k", "no_such_field", "messages"])
def test_large_bodies_are_refused_as_small_ones_are(field: str) -> None:
    """Those are validated in a thread, by other code."""
    app = fakes.application(fakes.FakeEngine())
    errors = []
    told: list[str] = []
    app.state.stats.refused = told.append
    for size in (10, 2 * heavy.LARGE):
        body = {"messages": [{"role": "user", "content": "x" * size}], field: [1, {}, None]}
        errors.append(error_of(fakes.call(app, "POST", CHAT, json=body)))
    assert errors[0] == errors[1]
    assert errors[0]["param"].split(".")[0] == field
    assert told == ["invalid", "invalid"]


def test_a_large_body_of_a_kind_that_is_no_json_is_refused() -> None:
    app = fakes.application(fakes.FakeEngine())
    response = fakes.call(app, "POST", CHAT, content=b"x" * 100_000, headers={"Content-Type": "text/plain"})
    assert "Content-Type: application/json" in error_of(response)["message"]


class SlowTokenizer:
    """Stands before a tokenizer, and lets a text wait."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.calls = 0
        self.go = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __len__(self) -> int:
        return len(self.tokenizer)

    def encode(self, text: str, **options: Any) -> list[int]:
        self.calls += 1
        if len(text) > 1000:
            assert self.go.wait(20)
        return list(self.tokenizer.encode(text, **options))


def test_long_texts_leave_short_ones_a_thread_and_end_with_their_clients() -> None:
    app = fakes.application(fakes.FakeEngine())
    text: model_text.ModelText = app.state.text
    slow = text.tokenizer = SlowTokenizer(text.tokenizer)

    async def main() -> None:
        long = "x" * (model_text.MOST_TOKENS + 1)
        waiting = [asyncio.create_task(post(app, "/tokenize", json.dumps({"prompt": long}).encode())) for _ in range(8)]
        while slow.calls < model_text.LONG_THREADS:
            await asyncio.sleep(0.01)
        response = await asyncio.wait_for(post(app, "/tokenize", b'{"prompt": "x"}'), 10)
        assert response.json()["count"] == 1
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        slow.go.set()
        text._long_threads.shutdown(wait=True)
        assert slow.calls == model_text.LONG_THREADS + 1  # none went on to its next piece, and none was begun

    asyncio.run(main())


def test_text_that_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_text, "MOST_WAITING", 5000)
    text: model_text.ModelText = fakes.application(fakes.FakeEngine()).state.text
    slow = text.tokenizer = SlowTokenizer(text.tokenizer)

    async def encode(count: int) -> int:
        return len(await text.encode("x" * count, special=False, most=10_000, param="prompt"))

    async def main() -> None:
        first = asyncio.create_task(encode(6000))  # one alone may be longer
        await asyncio.sleep(0.01)
        with pytest.raises(APIError) as caught:
            await encode(1)
        assert (caught.value.status, caught.value.code, caught.value.retry_after) == (429, "queue_full", 1)
        seconds = 0.0
        text._pace = pace = Pace(lambda: seconds)
        pace.watch(True)
        seconds = 2.0
        pace.done(1000)
        with pytest.raises(APIError) as caught:
            await encode(4000)
        assert caught.value.retry_after == 10  # 5,000 characters have to be done before, 500 a second
        slow.go.set()
        assert await first == 6000
        assert await encode(1) == 1

    asyncio.run(main())
