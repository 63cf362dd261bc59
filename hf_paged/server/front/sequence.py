"""Sequence: one output of a call, from its acceptance to its end, whichever engines it is on meanwhile."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections import abc
from typing import Any

from hf_paged.params import SamplingParams
from hf_paged.server.errors import invalid
from hf_paged.server.messages import Add, Delta, encode
from hf_paged.server.stats import RequestRecord
from hf_paged.server.text.stream import TextStream
from hf_paged.text.tokens import TokenTexts

_DEFAULTS = {field.name: getattr(SamplingParams(), field.name) for field in dataclasses.fields(SamplingParams)}
_FRONTS_OWN = ("n", "stop", "bad_words", "detokenize")  # the front handles these


@dataclasses.dataclass(eq=False)
class Sequence:
    """What was asked, the tokens so far, and what its call has not read of them yet.

    Iterating over it gives the deltas, up to the one with `finish`. A reader that is late gets several deltas as one.

    Attributes:
        record: what plugins see of it.
        prompt: token ids.
        params: how tokens are chosen; `n` is 1, and a sampled one has a seed.
        texts: of the model's tokens; None: it has no text.
        eos: ids that end it.
        banned: token sequences that must not be produced.
        priority: smaller runs first, where the scheduler is "priority"; a level is worth a minute of waiting.
        cache_key: only sequences of the same key share blocks.
        parent: one with the same prompt, submitted just before, whose blocks it shares.
        deadline, queue_deadline: points in `time.monotonic()` after which it ends, or ends unless it has begun.
        text: of the tokens that were read.
        sort_key: its place in the queue.
        output: tokens so far, over all engines that it was on.
        replica: index of the replica that has it, or None: it waits in the front.
        fresh: it was placed and brought nothing since.
        returning: an engine died under it, and it has brought nothing since.
        kills: engines that died while it was the only one that could have done it.
        done: it has ended.
        timers: of its deadlines.
    """

    record: RequestRecord
    prompt: abc.Sequence[int]
    params: SamplingParams
    texts: dataclasses.InitVar[TokenTexts | None] = None
    eos: frozenset[int] = frozenset()
    banned: tuple[tuple[int, ...], ...] = ()
    priority: int = 0
    cache_key: str | None = None
    parent: Sequence | None = None
    deadline: float | None = None
    queue_deadline: float | None = None
    sort_key: tuple[int, int] = (0, 0)
    output: list[int] = dataclasses.field(default_factory=list)
    replica: int | None = None
    fresh: bool = False
    returning: bool = False
    kills: int = 0
    done: bool = False
    timers: list[asyncio.TimerHandle] = dataclasses.field(default_factory=list)

    def __post_init__(self, texts: TokenTexts | None) -> None:
        self.text = TextStream(texts, self.prompt, self.params, self.eos)
        self._unread: list[Delta] = []
        self._wake: asyncio.Future[None] | None = None
        self._read = False  # the last delta was read
        self._waited = 0.0  # seconds, in the front
        self._prompt_logprobs_told = False

    @property
    def name(self) -> str:
        """Its id."""
        return self.record.request_id

    @property
    def index(self) -> int:
        """Which of its call's sequences it is."""
        return self.record.index

    @property
    def size(self) -> int:
        """Tokens that an engine would have to compute to get it going."""
        return len(self.prompt) + len(self.output)

    @property
    def expected(self) -> int:
        """Tokens that are still to be computed for it, at most: what a replica's load is measured in."""
        return (self.size if self.fresh else 0) + max(0, self._most - len(self.output))

    @property
    def _most(self) -> int:
        return self.params.max_tokens or 256

    def stay(self, now: float, typical: float | None) -> float | None:
        """Seconds that an engine has it in all, at its pace so far; None: it has brought nothing.

        Args:
            now: `time.monotonic()`.
            typical: tokens that outputs have on average; None: not known, it takes as many as it may.
        """
        if not self.output:
            return None
        tokens = max(len(self.output), min(self._most, typical or self._most))
        return (now - self.record.arrival - self._waited) * tokens / len(self.output)

    # ------------------------------------------------------------------------------------------------- to its engine

    def check(self) -> None:
        """Refuse a sequence that can't be packed for an engine, while nothing holds it yet.

        Raises:
            APIError: 400; a value of its parameters has no place in a message.
        """
        try:  # a child's prompt is its parent's, which was checked
            encode(self.message() if self.parent is None else packed(self.params))
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise invalid(f"a value of the request can't be handed to an engine: {error}") from None

    def message(self) -> Add:
        """What an engine is told to take it from its next token."""
        params, parent = packed(self.params), self.parent
        if self._prompt_logprobs_told:
            params.pop("prompt_logprobs", None)
        beside = parent is not None and parent.replica == self.replica and not parent.done
        return Add(
            id=self.name,
            prompt=list(self.prompt),
            params=params,
            output=self.output,
            eos=sorted(self.eos),
            banned=[list(ids) for ids in self.banned],
            priority=self.priority,
            cache_key=self.cache_key,
            parent=parent.name if parent is not None and beside else None,
            arrival=self.record.arrival,
        )

    def placed_on(self, replica: int) -> None:
        """It is handed to a replica."""
        self.replica, self.fresh = replica, True
        if not self.output:
            self._waited = time.monotonic() - self.record.arrival
        self.record.replica = replica

    def lost(self) -> None:
        """The engine that it was on is gone."""
        self.replica, self.fresh, self.returning = None, False, True
        self.record.resumed += 1

    def cancel_timers(self) -> None:
        """No deadline holds any more."""
        for timer in self.timers:
            timer.cancel()
        self.timers = []

    # --------------------------------------------------------------------------------------------------- to its call

    def take(self, delta: Delta) -> Delta:
        """Note what an engine brought; the delta, with times that hold over all engines it was on."""
        if delta.tokens:
            self.output += delta.tokens
            self.fresh = self.returning = False
            self.kills = 0
        self._prompt_logprobs_told = self._prompt_logprobs_told or delta.prompt_logprobs is not None
        if delta.finish is not None:
            delta.queued += self._waited
        if delta.finish == "refused" and self.output:  # it ran, on an engine that is gone
            delta.finish = "error"
        return delta

    def put(self, delta: Delta) -> None:
        """Hand a delta to the reader; the one with `finish` is the last."""
        self._unread.append(delta)
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def __aiter__(self) -> Sequence:
        return self

    async def __anext__(self) -> Delta:
        if self._read:
            raise StopAsyncIteration
        while not self._unread:
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        unread, self._unread = self._unread, []
        delta = unread[0] if len(unread) == 1 else _merged(unread)
        self._read = delta.finish is not None
        return delta


def _merged(deltas: list[Delta]) -> Delta:
    """Several deltas of one sequence as one. The last one tells how it ended, the first ones what began."""
    last = deltas[-1]
    merged = Delta(**{name: getattr(last, name) for name in last.__struct_fields__})
    merged.tokens = [token for delta in deltas for token in delta.tokens]
    if any(delta.logprobs is not None for delta in deltas):
        merged.logprobs = [entry for delta in deltas for entry in delta.logprobs or []]
    for delta in deltas:
        if delta.prompt_logprobs is not None:
            merged.prompt_logprobs = delta.prompt_logprobs
        if delta.cached is not None:
            merged.cached = delta.cached
    return merged


def packed(params: SamplingParams) -> dict[str, Any]:
    """The fields that differ from the defaults and that an engine needs, in types that msgpack knows."""
    found: dict[str, Any] = {}
    for name, default in _DEFAULTS.items():
        value = getattr(params, name)
        if name in _FRONTS_OWN or value == default:
            continue
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {field.name: _portable(getattr(value, field.name)) for field in dataclasses.fields(value)}
            value = {key: entry for key, entry in value.items() if entry is not None}
        found[name] = value
    return found


def _portable(value: Any) -> Any:
    """A JSON schema as its text: msgpack has no integers of more than 64 bits, and JSON does."""
    return json.dumps(value) if isinstance(value, abc.Mapping) else value
