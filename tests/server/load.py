"""Many streaming clients at once, on loopback."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx


@dataclasses.dataclass
class Outcome:
    """What a client got.

    Attributes:
        tokens: ids, in order. finish: the finish reason, or None.
        status: of HTTP; error: what broke, or None.
        times: points in `time.monotonic()`: of the request, then of each event.
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    finish: str | None = None
    status: int = 0
    error: str | None = None
    times: list[float] = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.status == 200 and self.error is None and self.finish is not None


def bodies(count: int, *, longest: int = 64, seed: int = 0) -> list[dict[str, Any]]:
    """Calls of mixed lengths: every second one greedy, the others sampled with a seed."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        prompt = [rng.randrange(3, 256) for _ in range(rng.randrange(4, 48))]
        sampled = {"temperature": 1.0, "seed": number} if number % 2 else {"temperature": 0.0}
        tokens = rng.randrange(longest // 2, longest + 1)
        found.append({"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "return_token_ids": True, **sampled})
    return found


async def stream(
    client: httpx.AsyncClient, body: dict[str, Any], on_token: Callable[[], None] = lambda: None, leave_after: int = 0
) -> Outcome:
    """Stream one call; hang up after so many tokens, if any."""
    outcome = Outcome(times=[time.monotonic()])
    try:
        async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            outcome.status = response.status_code
            if response.status_code != 200:
                outcome.error = (await response.aread()).decode()
                outcome.times.append(time.monotonic())
                return outcome
            async for line in response.aiter_lines():
                if line == "data: [DONE]" or not line.startswith("data: "):
                    continue
                outcome.times.append(time.monotonic())
                _take(outcome, json.loads(line[6:]))
                on_token()
                if leave_after and len(outcome.tokens) >= leave_after:
                    return outcome
    except httpx.HTTPError as error:
        outcome.error = repr(error)
    return outcome


def _take(outcome: Outcome, chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        outcome.error = chunk["error"]["message"]
        return
    for choice in chunk["choices"]:
        outcome.tokens += choice.get("token_ids") or []
        outcome.text += choice["text"]
        outcome.finish = choice["finish_reason"] or outcome.finish


def client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(300), limits=limits)


async def all_streams(url: str, calls: Sequence[dict[str, Any]], **options: Any) -> list[Outcome]:
    """Stream all calls at once."""
    async with client(url) as http:
        return list(await asyncio.gather(*(stream(http, body, **options) for body in calls)))


def metrics(url: str, *names: str) -> float:
    """The sum of these metrics, over all their labels."""
    lines = [
        line.rsplit(" ", 1)
        for line in httpx.get(url + "/metrics", timeout=60).text.splitlines()
        if not line.startswith("#")
    ]
    return sum(float(value) for name, value in lines if name.split("{")[0] in names)


HELD = ("hf_paged:num_requests_running", "hf_paged:num_requests_waiting", "hf_paged:kv_cache_usage_perc")


def seen(url: str) -> int:
    """How many requests were accepted so far."""
    return int(metrics(url, *HELD[:2], "hf_paged:request_success_total"))


def until_idle(url: str, seconds: float = 60) -> bool:
    """Whether the engine comes to hold nothing within that time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if metrics(url, *HELD) == 0:
            return True
        time.sleep(0.1)
    return False
