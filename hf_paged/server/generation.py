"""Call: one call of a generating endpoint, from its acceptance to the end of its answer."""

from __future__ import annotations

import asyncio
import functools
import itertools
import random
import time
from abc import ABC, abstractmethod
from collections import abc
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, ClassVar, TypeVar

from fastapi import Request

from hf_paged.params import SamplingParams
from hf_paged.server import heavy
from hf_paged.server.config import ServerConfig
from hf_paged.server.errors import APIError, check_model, ended, invalid
from hf_paged.server.front.fleet import Fleet
from hf_paged.server.front.sequence import Sequence
from hf_paged.server.messages import Delta, Ready
from hf_paged.server.protocol.common import Shared
from hf_paged.server.sampling import Shape, refusal, sampling_params
from hf_paged.server.stats import RequestRecord
from hf_paged.server.text.model_text import MOST_TOKENS, ModelText, too_long
from hf_paged.server.text.stream import Piece
from hf_paged.text.defaults import end_ids

T = TypeVar("T")
Prompts = abc.Sequence[tuple[list[int], SamplingParams]]
_numbers = itertools.count()
MOST_ALLOWED = 2**22  # allowed_token_ids of a call, once for each sequence
FEW = 32  # sequences of a call that are made in the event loop


class Call(ABC):
    """A call that was accepted, and its answer. Each route has its own kind.

    It counts as in flight from `open` to `close`, which has to come.

    Args:
        request: of HTTP.
        body: of the call.

    Attributes:
        prefix: of the answer's id. done: ends a stream.
        sequences: what the engine carries for it.

    Raises:
        APIError: 503, nothing is taken now; 404, the model isn't served; 400, a field can't be honoured here.
    """

    prefix: ClassVar[str]
    done: ClassVar[bytes] = b"data: [DONE]\n\n"

    def __init__(self, request: Request, body: Shared) -> None:
        state = request.app.state
        self.config: ServerConfig = state.config
        self.engine: Fleet = state.engine
        self.model_text: ModelText = state.text
        self.body = body
        self.seeds: random.Random = state.seeds
        self._lifecycle, self._stats = state.lifecycle, state.stats
        self.ready = self._check()
        self.client_id = body.request_id or request.state.request_id
        self.id = f"{self.prefix}-{self.client_id}"
        self.created = int(time.time())
        self.model = self.config.names[0] if body.model is None else body.model
        self.sequences: list[Sequence] = []
        self._endpoint = request.url.path
        self._trace = request.headers.get("traceparent")
        self._arrival = time.monotonic()
        self._cache_key = _cache_key(request, body.cache_salt)
        self._shape: Shape | None = None
        self._cached = 0
        self._refused = False
        self._open = False

    # ------------------------------------------------------------------------------------------------------- the answer

    @abstractmethod
    async def begin(self) -> None:
        """Read the prompts, and hand them to the engine."""

    @abstractmethod
    async def take(self, sequence: Sequence, piece: Piece) -> None:
        """Add a piece to the answer."""

    @abstractmethod
    def answer(self) -> dict[str, Any]:
        """The answer's body, after the last piece."""

    @abstractmethod
    async def events_of(self, sequence: Sequence, piece: Piece) -> list[bytes]:
        """The events of a streamed answer for a piece."""

    @abstractmethod
    def last_events(self) -> list[bytes]:
        """The events of a streamed answer after the last piece."""

    async def whole(self) -> dict[str, Any]:
        """The answer as one body."""
        await self.begin()
        async for sequence, piece in self.pieces():
            await self.take(sequence, piece)
        return self.answer()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events."""
        await self.begin()
        async for sequence, piece in self.pieces():
            for event in await self.events_of(sequence, piece):
                yield event
        for event in self.last_events():
            yield event

    def open(self) -> None:
        """Count the call as in flight."""
        self._open = True
        self._lifecycle.in_flight += 1

    async def close(self) -> None:
        """The call is answered, or nobody waits for the answer: what still runs is aborted."""
        if not self._open:
            return
        self._open = False
        self._lifecycle.in_flight -= 1
        for sequence in self.sequences:  # a sequence without a token shares the refusal of its call
            ran = sequence.record.first_token is not None
            self.engine.abort(sequence, "refused" if self._refused and not ran else "abort")

    # ------------------------------------------------------------------------------------------------------- acceptance

    def _check(self) -> Ready:
        self._refusing(self._lifecycle.check)
        self._refusing(self.engine.check_room, 1)  # before its text is tokenised
        check_model(self.body.model, self.config.names)
        if self.body.priority and self.config.paged.scheduler != "priority":
            raise invalid(f"priority={self.body.priority} needs the server's --option scheduler=priority", "priority")
        self._check_logprobs()
        assert self.engine.info is not None  # check_room refuses calls before that
        return self.engine.info

    def _check_logprobs(self) -> None:
        """What a token reports is bounded: -1 asks for the whole vocabulary, for each token of the prompt."""
        most = self.config.max_logprobs
        for name in ("prompt_logprobs", "top_logprobs", "logprobs"):
            asked = getattr(self.body, name, None)
            if most >= 0 and isinstance(asked, int) and not 0 <= asked <= most:
                raise invalid(f"{name}={asked} is outside 0 to {most}, the server's --max-logprobs", name)

    def _refusing(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function; a refusal is counted."""
        try:
            return function(*arguments)
        except APIError as error:
            self._stats.refused(error.code or "refused")
            raise

    # ---------------------------------------------------------------------------------------------------------- prompts

    async def ids(self, text: str, *, special: bool, param: str) -> list[int]:
        """The ids of a text, cut as the call wants it.

        Raises:
            APIError: 400, it is too long.
        """
        cut = self.body.truncate_prompt_tokens is not None
        most = max(self.ready.longest, MOST_TOKENS) if cut else self.ready.longest
        ids = await self.model_text.encode(text, special=special, most=most, param=param, context=not cut)
        return self.cut(ids)

    def cut(self, ids: list[int]) -> list[int]:
        """The last tokens of a prompt, as many as `truncate_prompt_tokens` says."""
        keep = self.body.truncate_prompt_tokens
        if keep is None:
            return ids
        keep = self.ready.longest - 1 if keep == -1 else keep
        if keep == 0:
            raise invalid("truncate_prompt_tokens=0 leaves nothing of the prompt", "truncate_prompt_tokens")
        return ids[-keep:]

    def room(self, prompt: abc.Sequence[int], param: str, **wanted: int | None) -> int:
        """How many tokens the output may have: what is wanted, or as many as fit.

        Args:
            param: the field that the prompt is from.
            wanted: the fields that say how long the output may be; the first that is given counts.

        Raises:
            APIError: 400, the prompt is empty, or it doesn't fit with the output.
        """
        if not prompt:
            raise invalid("the prompt is empty; give at least one token", param)
        name, most = next(((name, count) for name, count in wanted.items() if count), ("", None))
        if len(prompt) + (most or 1) > self.ready.longest:
            alone = most is not None and most >= self.ready.longest  # no prompt would fit with it
            raise too_long(len(prompt), self.ready.longest, param, most or 1, fault=name if alone else param)
        return most or self.ready.longest - len(prompt)

    # ------------------------------------------------------------------------------------------------------- generation

    def check_room(self, sequences: int) -> None:
        """Refuse a call of more sequences than are taken, before anything is made for each of them.

        Raises:
            APIError: 429, the queue is full; 400, more sequences than the server ever takes.
        """
        self._refusing(self.engine.check_room, sequences)
        allowed = len(self.body.allowed_token_ids or ())
        if sequences * allowed > MOST_ALLOWED:
            message = (
                f"{allowed} allowed_token_ids for each of {sequences} sequences are more than {MOST_ALLOWED} in all"
            )
            raise invalid(message, "allowed_token_ids")

    @property
    def has_long_lists(self) -> bool:
        """Whether its sampling parameters take long to check."""
        lists = (self.body.allowed_token_ids, getattr(self.body, "logit_bias", None))
        return any(len(one) > heavy.MANY for one in lists if one)

    async def start_one(
        self, text: str, *, special: bool, param: str, shape: Shape | None, logprobs: int | None, **wanted: int | None
    ) -> SamplingParams:
        """Hand over the sequences of one text; their parameters.

        Args:
            special, param: as for `ids`. wanted: as for `room`. shape: as for `start`.
            logprobs: likeliest tokens to report.
        """
        ids = await self.ids(text, special=special, param=param)
        most = self.room(ids, param, **wanted)
        make = functools.partial(sampling_params, seeds=self.seeds, max_tokens=most, logprobs=logprobs, shape=shape)
        params = await heavy.run_if(self.has_long_lists, make, self.body, self.ready)
        await self.start([(ids, params)], shape)
        return params

    async def start(self, prompts: Prompts, shape: Shape | None = None) -> None:
        """Hand the call's sequences to the engine: for each prompt `n` of them. `shape`: what they have to be like.

        Raises:
            APIError: 429, the queue is full; 400, more sequences than the server ever takes.
        """
        self._shape = shape
        count = sum(params.n for _, params in prompts)
        self.check_room(count)
        words = prompts[0][1].bad_words
        banned = await self.model_text.banned(words) if words else ()
        large = count > FEW or self.has_long_lists
        made = await heavy.run_if(large, self._made, prompts, banned)
        self._refusing(self.engine.submit, made)
        self.sequences = made  # after `submit`, since `close` aborts them

    def _made(self, prompts: Prompts, banned: tuple[tuple[int, ...], ...]) -> list[Sequence]:
        ends = end_ids(self.ready.eos, self.model_text.tokenizer)
        timeout = self.body.timeout or self.config.default_timeout
        waiting = self.config.max_queue_seconds
        made: list[Sequence] = []
        for ids, params in prompts:
            first = len(made)
            for i in range(params.n):
                sequence = Sequence(
                    self._record(len(made), ids, params),
                    ids,
                    params.replace(n=1, seed=params.seed + i if params.seed is not None else None),
                    self.model_text.tokens,
                    eos=ends,
                    banned=banned,
                    priority=self.body.priority,
                    cache_key=self._cache_key,
                    parent=made[first] if i else None,
                    deadline=self._arrival + timeout if timeout else None,
                    queue_deadline=self._arrival + waiting if waiting else None,
                )
                made.append(sequence)
        return made

    def _record(self, index: int, ids: list[int], params: SamplingParams) -> RequestRecord:
        return RequestRecord(
            request_id=f"{self.client_id}-{next(_numbers)}",
            client_id=self.client_id,
            endpoint=self._endpoint,
            model=self.model,
            user=self.body.user,
            index=index,
            n=params.n,
            prompt_tokens=len(ids),
            max_tokens=params.max_tokens,
            stream=bool(self.body.stream),
            traceparent=self._trace,
            arrival=self._arrival,
        )

    async def pieces(self) -> AsyncIterator[tuple[Sequence, Piece]]:
        """What the sequences bring, as it comes; of each one the last piece has a finish reason.

        Raises:
            APIError: one of them failed; the others are of no use then.
        """
        if len(self.sequences) == 1:
            async for piece in self._pieces_of(self.sequences[0]):
                yield self.sequences[0], piece
            return
        merged: asyncio.Queue[tuple[Sequence, Piece | BaseException]] = asyncio.Queue()
        tasks = [asyncio.create_task(self._forward(sequence, merged)) for sequence in self.sequences]
        try:
            left = len(tasks)
            while left:
                sequence, found = await merged.get()
                if isinstance(found, BaseException):
                    raise found
                left -= found.finish_reason is not None
                yield sequence, found
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _forward(self, sequence: Sequence, merged: asyncio.Queue[tuple[Sequence, Piece | BaseException]]) -> None:
        try:
            async for piece in self._pieces_of(sequence):
                merged.put_nowait((sequence, piece))
        except Exception as error:
            merged.put_nowait((sequence, error))

    async def _pieces_of(self, sequence: Sequence) -> AsyncIterator[Piece]:
        async for delta in sequence:
            self._check_end(delta)
            piece = sequence.text.add(delta)
            if sequence.parent is None:  # copies find what the first one computed
                self._cached += piece.cached or 0
            ended = piece.finish_reason is not None
            if ended and delta.finish is None:
                self.engine.abort(sequence, "stop")
            yield piece
            if ended:
                return

    def _check_end(self, delta: Delta) -> None:
        """Raise what ended a sequence, unless it ended well. A call of which one is refused counts as refused, once."""
        if delta.finish == "refused" and not self._refused:
            self._refused = True
            self._stats.refused(delta.error_kind or "refused")
        if error := ended(delta.finish, "timeout" if self.body.timeout else None, delta.retry_after):
            raise error
        if delta.finish in ("error", "refused"):
            message = delta.error or "the request failed"
            if delta.error_kind == "invalid":
                raise refusal(message, self.body, self._shape)
            if delta.error_kind == "rejected":
                raise APIError(429, message, code="rejected", retry_after=delta.retry_after)
            raise APIError(500, message, code="engine_error")

    def usage(self) -> dict[str, Any]:
        """Token counts so far, as `protocol.common.Usage` has them: each prompt once."""
        prompts = {id(sequence.prompt): len(sequence.prompt) for sequence in self.sequences}
        prompt, output = sum(prompts.values()), sum(sequence.text.num_tokens for sequence in self.sequences)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": min(self._cached, prompt)},
        }


def _cache_key(request: Request, salt: str | None) -> str | None:
    """Which requests share blocks: those of one API key, where there are several, and of one salt."""
    if len(request.app.state.config.api_keys) < 2:
        return salt
    return f"{request.state.api_key}:{salt or ''}"
