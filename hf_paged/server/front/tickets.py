"""A sequence in the fleet's care: what is needed to begin it again elsewhere, and the stream of its answer."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from hf_paged.params import SamplingParams
from hf_paged.server.errors import invalid
from hf_paged.server.front.engine import Submission
from hf_paged.server.messages import Add, Delta, encode

if TYPE_CHECKING:
    from hf_paged.server.front.replica import Replica

_DEFAULTS = {field.name: getattr(SamplingParams(), field.name) for field in dataclasses.fields(SamplingParams)}
_FRONTS_OWN = ("n", "stop", "bad_words", "detokenize")  # the front sees to these


class Stream:
    """What a sequence brings, as an async iterator. A reader that is late gets several deltas as one.

    Args:
        on_leave: called when the reader leaves before the end.
    """

    def __init__(self, on_leave: Callable[[], None]) -> None:
        self._pending: list[Delta] = []
        self._wake: asyncio.Future[None] | None = None
        self._on_leave = on_leave
        self._ended = False

    def put(self, delta: Delta) -> None:
        """Add a delta; the one with `finish` is the last."""
        self._pending.append(delta)
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Delta:
        if self._ended:
            raise StopAsyncIteration
        while not self._pending:
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        pending, self._pending = self._pending, []
        delta = pending[0] if len(pending) == 1 else _merged(pending)
        self._ended = delta.finish is not None
        return delta

    async def aclose(self) -> None:
        """Leave. Before the end that aborts the sequence."""
        if not self._ended:
            self._ended = True
            self._on_leave()


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


class Ticket:
    """A sequence that the fleet has accepted and not finished.

    Args:
        submission: what it is.
        order: its number.
        turn: what the queue is ordered by before the number, smallest first.
        on_leave: called when its reader leaves before the end.

    Attributes:
        output: tokens so far, over all engines that it was on.
        replica: where it is placed, or None: it waits in the front.
        fresh: it was placed and brought nothing since.
        returning: an engine died under it, and it has brought nothing since.
        kills: engines that died while it was the only one that could have done it.
    """

    def __init__(self, submission: Submission, order: int, turn: int, on_leave: Callable[[Ticket], None]) -> None:
        self.submission = submission
        self.name = submission.record.request_id
        self.sort_key = (turn, order)
        self.stream = Stream(lambda: on_leave(self))
        self.output: list[int] = []
        self.replica: Replica | None = None
        self.fresh = False
        self.returning = False
        self.kills = 0
        self.done = False
        self.timers: list[asyncio.TimerHandle] = []
        self._placed = 0.0
        self._waited = 0.0
        self._prompt_logprobs_told = False

    @property
    def size(self) -> int:
        """Tokens that an engine would have to compute to get it going."""
        return len(self.submission.prompt) + len(self.output)

    @property
    def expected(self) -> int:
        """Tokens that are still to be computed for it, at most: what a replica's load is measured in."""
        return (self.size if self.fresh else 0) + max(0, self._most - len(self.output))

    @property
    def _most(self) -> int:
        return self.submission.params.max_tokens or 256

    def stay(self, now: float, typical: float | None) -> float | None:
        """Seconds that an engine has it in all, at its pace so far; None: it has brought nothing.

        Args:
            now: `time.monotonic()`.
            typical: tokens that outputs have on average; None: not known, it takes as many as it may.
        """
        if not self.output:
            return None
        tokens = max(len(self.output), min(self._most, typical or self._most))
        return (now - self.submission.record.arrival - self._waited) * tokens / len(self.output)

    def check(self) -> None:
        """Refuse a sequence that can't be packed for an engine, while nothing holds it yet.

        Raises:
            APIError: 400; a value of its parameters has no place in a message.
        """
        copy = self.submission.parent is not None  # of a prompt that was looked at with its parent
        try:
            encode(packed(self.submission.params) if copy else self.message(None))
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise invalid(f"a value of the request can't be handed to an engine: {error}") from None

    def message(self, parent: Ticket | None) -> Add:
        """What an engine is told to take it from its next token."""
        submission, params = self.submission, packed(self.submission.params)
        if self._prompt_logprobs_told:
            params.pop("prompt_logprobs", None)
        return Add(
            id=self.name,
            prompt=list(submission.prompt),
            params=params,
            output=self.output,
            eos=sorted(submission.eos),
            banned=[list(ids) for ids in submission.banned],
            priority=submission.priority,
            cache_key=submission.cache_key,
            parent=parent.name if parent is not None and parent.replica is self.replica and not parent.done else None,
            arrival=submission.record.arrival,
        )

    def placed_on(self, replica: Replica) -> None:
        """It is handed to a replica."""
        self.replica, self.fresh = replica, True
        self._placed = time.monotonic()
        if not self.output:
            self._waited = self._placed - self.submission.record.arrival
        self.submission.record.replica = replica.index

    def lost(self) -> None:
        """The engine that it was on is gone."""
        self.replica, self.fresh, self.returning = None, False, True
        self.submission.record.resumed += 1

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

    def cancel_timers(self) -> None:
        """No deadline holds any more."""
        for timer in self.timers:
            timer.cancel()
        self.timers = []


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
    return json.dumps(value) if isinstance(value, Mapping) else value
