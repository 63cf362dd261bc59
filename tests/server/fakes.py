"""An engine that answers without a model, and an application over it, in this process."""

from __future__ import annotations

import asyncio
from collections import abc
from typing import Any

import httpx
import tiny
from fastapi import FastAPI

from hf_paged.server.app import create_app
from hf_paged.server.config import ServerConfig
from hf_paged.server.errors import APIError, invalid
from hf_paged.server.front.fleet import Snapshot
from hf_paged.server.front.sequence import Sequence
from hf_paged.server.lifecycle import Phase
from hf_paged.server.messages import Delta, Ready
from hf_paged.server.stats import ServerStats
from hf_paged.server.text.model_text import ModelText

READY = Ready(
    pid=0,
    model="Fake",
    max_model_len=128,
    longest=128,
    vocab_size=256,
    num_logits=256,
    eos=[2],
    max_num_seqs=8,
    block_size=16,
    num_blocks=8,
    backend="none",
    scheduler="fcfs",
    plugins={},
    structured=False,
    defaults={},
)


class FakeEngine:
    """Says one text to everything, a token at a time. Keeps what it was asked."""

    def __init__(self, text: str = "hello", **ready: Any) -> None:
        self.info: Ready | None = Ready(**{**{n: getattr(READY, n) for n in READY.__struct_fields__}, **ready})
        self.asked: list[Sequence] = []
        self.aborted: list[tuple[Sequence, str]] = []
        self.refusal: APIError | None = None
        self.most = 2048  # sequences of a call
        self.finish = "stop"
        self._ids = tiny.tokenizer().encode(text, add_special_tokens=False)

    def check_room(self, count: int, tokens: int = 0) -> None:
        if count > self.most:
            raise invalid(f"{count} sequences are too many", "n")
        if self.refusal:
            raise self.refusal

    def submit(self, group: abc.Sequence[Sequence]) -> None:
        for sequence in group:
            self.asked.append(sequence)
            self._task = asyncio.ensure_future(self._say(sequence))

    async def _say(self, sequence: Sequence) -> None:
        for token in self._ids:
            sequence.put(Delta("x", tokens=[token]))
            await asyncio.sleep(0)
        sequence.put(Delta("x", tokens=[2] if self.finish == "stop" else [], finish=self.finish))

    def abort(self, sequence: Sequence, reason: str = "abort") -> None:
        self.aborted.append((sequence, reason))

    def abort_all(self) -> None: ...

    def snapshot(self) -> Snapshot:
        return Snapshot(True, True, "ok", 0, 0, 0, ("ready",))

    async def close(self) -> None: ...


def application(engine: FakeEngine, **options: Any) -> FastAPI:
    """A server's application that is ready."""
    config = ServerConfig(model="fake", **options)
    app = create_app(config, engine, ModelText(tiny.tokenizer()), ServerStats())
    app.state.lifecycle.phase = Phase.READY
    return app


def call(app: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
    """One call, in this process."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())
