"""Call: one call of a generating endpoint, from its acceptance to its last piece of text."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

from fastapi import Request

from hf_paged.params import SamplingParams
from hf_paged.server import heavy
from hf_paged.server.config import ServerConfig
from hf_paged.server.errors import APIError, ended, invalid
from hf_paged.server.front.engine import EngineClient, Submission
from hf_paged.server.messages import Delta, Ready
from hf_paged.server.protocol.common import PromptTokensDetails, Shared, Usage
from hf_paged.server.sampling import Shape, refusal
from hf_paged.server.stats import RequestRecord
from hf_paged.server.text.model_text import MOST_TOKENS, ModelText, too_long
from hf_paged.server.text.stream import Piece, TextStream

T = TypeVar("T")
_numbers = itertools.count()
MOST_ALLOWED = 2**22  # allowed_token_ids of a call, once for each sequence
FEW = 32  # sequences of a call that are made in the event loop


class Choice:
    """One sequence of a call.

    Attributes:
        index: in the answer. prompt: ids of its prompt.
        tokens: output tokens that count so far.
    """

    def __init__(self, index: int, submission: Submission, stream: Any, text: TextStream) -> None:
        self.index = index
        self.submission = submission
        self.stream = stream
        self.text = text

    @property
    def tokens(self) -> int:
        """Output tokens that count so far."""
        return self.text.num_tokens

    @property
    def prompt(self) -> Sequence[int]:
        """Ids of its prompt."""
        return self.submission.prompt


class Call:
    """A call that was accepted. It counts as in flight until `close`, which has to come.

    Args:
        request: of HTTP.
        body: of the call.
        prefix: of the answer's id.

    Raises:
        APIError: 503, nothing is taken now; 404, the model isn't served; 400, a field can't be honoured here.
    """

    def __init__(self, request: Request, body: Shared, prefix: str) -> None:
        state = request.app.state
        self.config: ServerConfig = state.config
        self.engine: EngineClient = state.engine
        self.model_text: ModelText = state.text
        self.seeds: random.Random = state.seeds
        self.body = body
        self._lifecycle, self._stats = state.lifecycle, state.stats
        self.ready = self._check()
        self.client_id = body.request_id or request.state.request_id
        self.id = f"{prefix}-{self.client_id}"
        self.created = int(time.time())
        self.model = self.config.names[0] if body.model is None else body.model
        self.choices: list[Choice] = []
        self._endpoint = request.url.path
        self._trace = request.headers.get("traceparent")
        self._arrival = time.monotonic()
        self._cache_key = _cache_key(request, body.cache_salt)
        self._shape: Shape | None = None
        self._cached = 0
        self._refused = False
        self._open = True
        self._lifecycle.in_flight += 1

    def _check(self) -> Ready:
        self._refusing(self._lifecycle.check)
        self._refusing(self.engine.check_room, 1)  # before any of its text is looked at
        if self.body.model is not None and self.body.model not in self.config.names:
            raise APIError(
                404,
                f"the model {self.body.model!r} is not served; served are {', '.join(self.config.names)}",
                param="model",
                code="model_not_found",
            )
        if self.body.priority and self.config.paged.scheduler != "priority":
            raise invalid(f"priority={self.body.priority} needs the server's --option scheduler=priority", "priority")
        self._check_logprobs()
        assert self.engine.info is not None  # else there would be no room
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

    @property
    def most(self) -> int:
        """Tokens that a request may have, prompt and output."""
        return self.ready.longest

    async def ids(self, text: str, *, special: bool, param: str) -> list[int]:
        """The ids of a text, cut as the call wants it.

        Raises:
            APIError: 400, it is too long.
        """
        cut = self.body.truncate_prompt_tokens is not None
        most = max(self.most, MOST_TOKENS) if cut else self.most
        ids = await self.model_text.encode(text, special=special, most=most, param=param, context=not cut)
        return self.cut(ids)

    def cut(self, ids: list[int]) -> list[int]:
        """The last tokens of a prompt, as many as `truncate_prompt_tokens` says."""
        keep = self.body.truncate_prompt_tokens
        if keep is None:
            return ids
        keep = self.most - 1 if keep == -1 else keep
        if keep == 0:
            raise invalid("truncate_prompt_tokens=0 leaves nothing of the prompt", "truncate_prompt_tokens")
        return ids[-keep:]

    def room(self, prompt: Sequence[int], param: str, **wanted: int | None) -> int:
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
        if len(prompt) + (most or 1) > self.most:
            alone = most is not None and most >= self.most  # no prompt would fit with it
            raise too_long(len(prompt), self.most, param, most or 1, fault=name if alone else param)
        return most or self.most - len(prompt)

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

    async def start(self, prompts: Sequence[tuple[list[int], SamplingParams]], shape: Shape | None = None) -> None:
        """Hand the call's sequences to the engine: for each prompt `n` of them. `shape`: what they have to be like.

        Raises:
            APIError: 429, the queue is full; 400, more sequences than the server ever takes.
        """
        self._shape = shape
        count = sum(params.n for _, params in prompts)
        self.check_room(count)
        words = prompts[0][1].bad_words
        banned = await self.model_text.banned(words) if words else ()
        ends = self.model_text.eos.union(self.ready.eos)
        # Whatever can fail comes before the engine has them: `close` aborts the choices, and no others.
        large = count > FEW or self.has_long_lists
        flat, texts = await heavy.run_if(large, self._made, prompts, ends, banned)
        streams = self._refusing(self.engine.submit, flat)
        for index, (submission, stream, text) in enumerate(zip(flat, streams, texts, strict=True)):
            submission.record.index = index
            self.choices.append(Choice(index, submission, stream, text))

    def _made(
        self, prompts: Sequence[tuple[list[int], SamplingParams]], ends: frozenset[int], banned: Any
    ) -> tuple[list[Submission], list[TextStream]]:
        groups = [self._group(ids, params, ends, banned) for ids, params in prompts]
        flat = [submission for group in groups for submission in group]
        return flat, [TextStream(self.model_text.tokens, one.prompt, one.params, ends) for one in flat]

    def _group(self, ids: list[int], params: SamplingParams, ends: frozenset[int], banned: Any) -> list[Submission]:
        group: list[Submission] = []
        timeout = self.body.timeout or self.config.default_timeout
        waiting = self.config.max_queue_seconds
        for i in range(params.n):
            record = RequestRecord(
                request_id=f"{self.client_id}-{next(_numbers)}",
                client_id=self.client_id,
                endpoint=self._endpoint,
                model=self.model,
                user=self.body.user,
                n=params.n,
                prompt_tokens=len(ids),
                max_tokens=params.max_tokens,
                stream=bool(self.body.stream),
                traceparent=self._trace,
                arrival=self._arrival,
            )
            own = params.replace(n=1, seed=params.seed + i if params.seed is not None else None)
            group.append(
                Submission(
                    record=record,
                    prompt=ids,
                    params=own,
                    eos=ends,
                    banned=banned,
                    priority=self.body.priority,
                    cache_key=self._cache_key,
                    parent=group[0] if group else None,
                    deadline=self._arrival + timeout if timeout else None,
                    queue_deadline=self._arrival + waiting if waiting else None,
                )
            )
        return group

    async def pieces(self) -> AsyncIterator[tuple[Choice, Piece]]:
        """What the sequences bring, as it comes; of each one the last piece has a finish reason.

        Raises:
            APIError: one of them failed; the others are of no use then.
        """
        if len(self.choices) == 1:
            async for piece in self._pieces_of(self.choices[0]):
                yield self.choices[0], piece
            return
        merged: asyncio.Queue[tuple[Choice, Piece | BaseException]] = asyncio.Queue()
        tasks = [asyncio.create_task(self._forward(choice, merged)) for choice in self.choices]
        try:
            left = len(tasks)
            while left:
                choice, found = await merged.get()
                if isinstance(found, BaseException):
                    raise found
                piece = found
                left -= piece.finish_reason is not None
                yield choice, piece
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _forward(self, choice: Choice, merged: asyncio.Queue[tuple[Choice, Piece | BaseException]]) -> None:
        try:
            async for piece in self._pieces_of(choice):
                merged.put_nowait((choice, piece))
        except Exception as error:
            merged.put_nowait((choice, error))

    async def _pieces_of(self, choice: Choice) -> AsyncIterator[Piece]:
        async for delta in choice.stream:
            self._note_refusal(delta)
            self._check_end(delta)
            piece = choice.text.add(delta)
            if choice.submission.parent is None:  # the others share what the first one computes
                self._cached += piece.cached or 0
            if piece.finish_reason is not None and delta.finish is None:
                self.engine.abort(choice.submission, "stop")
            yield piece
            if piece.finish_reason is not None:
                return

    def _check_end(self, delta: Delta) -> None:
        """Raise what ended a sequence, unless it ended well."""
        if error := ended(delta.finish, "timeout" if self.body.timeout else None, delta.retry_after):
            raise error
        if delta.finish in ("error", "refused"):
            message = delta.error or "the request failed"
            if delta.error_kind == "invalid":
                raise refusal(message, self.body, self._shape)
            if delta.error_kind == "rejected":
                raise APIError(429, message, code="rejected", retry_after=delta.retry_after)
            raise APIError(500, message, code="engine_error")

    def _note_refusal(self, delta: Delta) -> None:
        """Count a call of which the engine refuses a sequence, once."""
        if delta.finish == "refused" and not self._refused:
            self._refused = True
            self._stats.refused(delta.error_kind or "refused")

    def usage(self) -> Usage:
        """Token counts so far: each prompt once."""
        prompts = {id(choice.submission.prompt): len(choice.submission.prompt) for choice in self.choices}
        prompt, output = sum(prompts.values()), sum(choice.tokens for choice in self.choices)
        details = PromptTokensDetails(cached_tokens=min(self._cached, prompt))
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=output,
            total_tokens=prompt + output,
            prompt_tokens_details=details,
        )

    async def close(self) -> None:
        """The call is answered, or nobody waits for the answer: what still runs is aborted."""
        if not self._open:
            return
        self._open = False
        self._lifecycle.in_flight -= 1
        for choice in self.choices:  # what didn't run shares the refusal of its call
            ran = choice.submission.record.first_token is not None
            self.engine.abort(choice.submission, "refused" if self._refused and not ran else "abort")


def _cache_key(request: Request, salt: str | None) -> str | None:
    """Which requests share blocks: those of one API key, where there are several, and of one salt."""
    if len(request.app.state.config.api_keys) < 2:
        return salt
    return f"{request.state.api_key}:{salt or ''}"
