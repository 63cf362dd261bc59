"""Call: one call of a generating endpoint, from its acceptance to its last piece of text."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request

from hf_paged.params import SamplingParams
from hf_paged.server.config import ServerConfig
from hf_paged.server.errors import APIError, invalid
from hf_paged.server.front.engine import EngineClient, Submission
from hf_paged.server.messages import Delta, Ready
from hf_paged.server.protocol.common import PromptTokensDetails, Shared, Usage
from hf_paged.server.stats import RequestRecord
from hf_paged.server.text.model_text import ModelText, too_long
from hf_paged.server.text.stream import Piece, TextStream

_numbers = itertools.count()


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
        self._cached = 0
        self._refused = False
        self._open = True
        self._lifecycle.in_flight += 1

    def _check(self) -> Ready:
        try:
            self._lifecycle.check()
            self.engine.check_room(1)  # before any of its text is looked at
        except APIError as error:
            self._stats.refused(error.code or "refused")
            raise
        if self.body.model is not None and self.body.model not in self.config.names:
            raise APIError(
                404,
                f"the model {self.body.model!r} is not served; served are {', '.join(self.config.names)}",
                param="model",
                code="model_not_found",
            )
        if self.body.priority and self.config.paged.scheduler != "priority":
            raise invalid(
                f"priority={self.body.priority} needs the scheduler 'priority'; start the server with it", "priority"
            )
        assert self.engine.info is not None  # else there would be no room
        return self.engine.info

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
        ids = await self.model_text.encode(text, special=special, most=None if cut else self.most, param=param)
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

    def room(self, prompt: Sequence[int], wanted: int | None, param: str) -> int:
        """How many tokens the output may have: what is wanted, or as many as fit.

        Raises:
            APIError: 400, the prompt is empty, or it doesn't fit with the output.
        """
        if not prompt:
            raise invalid("the prompt is empty; give at least one token", param)
        if len(prompt) + (wanted or 1) > self.most:
            raise too_long(len(prompt), self.most, param, wanted or 1)
        return wanted or self.most - len(prompt)

    # ------------------------------------------------------------------------------------------------------- generation

    async def start(self, prompts: Sequence[tuple[list[int], SamplingParams]]) -> None:
        """Hand the call's sequences to the engine: for each prompt `n` of them.

        Raises:
            APIError: 429, the queue is full.
        """
        words = prompts[0][1].bad_words
        banned = await self.model_text.banned(words) if words else ()
        ends = self.model_text.eos.union(self.ready.eos)
        groups = [self._group(ids, params, ends, banned) for ids, params in prompts]
        flat = [submission for group in groups for submission in group]
        try:
            streams = self.engine.submit(flat)
        except APIError as error:
            self._stats.refused(error.code or "refused")
            raise
        for index, (submission, stream) in enumerate(zip(flat, streams, strict=True)):
            submission.record.index = index
            text = TextStream(self.model_text.tokenizer, submission.prompt, submission.params, ends)
            self.choices.append(Choice(index, submission, stream, text))

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
                    cache_key=self.body.cache_salt,
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
            _check(delta)
            piece = choice.text.add(delta)
            if choice.submission.parent is None:  # the others share what the first one computes
                self._cached += piece.cached or 0
            if piece.finish_reason is not None and delta.finish is None:
                self.engine.abort(choice.submission, "stop")
            yield piece
            if piece.finish_reason is not None:
                return

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


def _check(delta: Delta) -> None:
    """Raise what ended a sequence, unless it ended well."""
    if delta.finish == "deadline":
        raise APIError(408, "the deadline of this request is over; give a longer timeout", code="deadline_exceeded")
    if delta.finish == "queue_timeout":
        raise APIError(
            429, "the request waited too long for its turn; try again later", code="queue_timeout", retry_after=2
        )
    if delta.finish == "abort":
        raise APIError(503, "the request was aborted: the server is shutting down", code="aborted", retry_after=5)
    if delta.finish in ("error", "refused"):
        message = delta.error or "the request failed"
        if delta.error_kind == "invalid":
            raise invalid(message)
        if delta.error_kind == "rejected":
            raise APIError(429, message, code="rejected", retry_after=delta.retry_after)
        raise APIError(500, message, code="engine_error")
