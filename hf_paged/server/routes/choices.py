"""ChoicesCall: a call that is answered with choices, one a sequence."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

from fastapi import Request

from hf_paged.server.front.sequence import Sequence
from hf_paged.server.generation import Call
from hf_paged.server.protocol.common import Sampled
from hf_paged.server.routes.respond import event, prompt_logprobs_json
from hf_paged.server.text.stream import Piece

Chunk = tuple[dict[str, Any], dict[str, Any]]  # a choice, and what the chunk has beside it


class ChoicesCall(Call):
    """A call of /v1/completions or /v1/chat/completions. They differ in what a choice looks like.

    Attributes:
        kinds: the `object` of an answer, and of a chunk of a stream.
    """

    body: Sampled
    kinds: ClassVar[tuple[str, str]]

    def __init__(self, request: Request, body: Sampled) -> None:
        super().__init__(request, body)
        self._choices: dict[int, dict[str, Any]] = {}  # by index; for a stream, empty
        self._beside: dict[str, Any] = {}  # what the answer has beside its choices

    @abc.abstractmethod
    async def choice_of(self, sequence: Sequence, piece: Piece, first: bool) -> dict[str, Any]:
        """What a piece adds to a choice. `first`: the choice begins with it."""

    @abc.abstractmethod
    async def chunks_of(self, sequence: Sequence, piece: Piece, first: bool) -> list[Chunk]:
        """What a stream tells of a piece."""

    async def take(self, sequence: Sequence, piece: Piece) -> None:
        first = sequence.index not in self._choices
        part = await self.choice_of(sequence, piece, first)
        extend(self._choices.setdefault(sequence.index, {}), part)

    def answer(self) -> dict[str, Any]:
        choices = [self._choices[index] for index in sorted(self._choices)]
        return self.body_of(self.kinds[0], choices, counted=True) | self._beside

    async def events_of(self, sequence: Sequence, piece: Piece) -> list[bytes]:
        options = self.body.stream_options
        counted = bool(options and options.continuous_usage_stats)
        first = sequence.index not in self._choices
        self._choices.setdefault(sequence.index, {})
        found = await self.chunks_of(sequence, piece, first)
        return [event(self.body_of(self.kinds[1], [one], counted) | beside) for one, beside in found]

    def last_events(self) -> list[bytes]:
        options = self.body.stream_options
        counted = bool(options and options.include_usage)
        return [event(self.body_of(self.kinds[1], [], counted))] if counted else []

    def body_of(self, kind: str, choices: list[dict[str, Any]], counted: bool) -> dict[str, Any]:
        """An answer, or a chunk of one; `counted`: with the tokens so far."""
        body = {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}
        return body | ({"usage": self.usage()} if counted else {})

    async def of_prompt(self, sequence: Sequence, piece: Piece, first: bool) -> dict[str, Any]:
        """What is told of the prompt: its ids, and their log-probabilities."""
        found: dict[str, Any] = {}
        if first and self.body.return_token_ids:
            found["prompt_token_ids"] = list(sequence.prompt)
        if self.body.prompt_logprobs is not None and piece.prompt_logprobs is not None:
            found["prompt_logprobs"] = await prompt_logprobs_json(self.model_text, piece.prompt_logprobs)
        return found


def extend(whole: dict[str, Any], part: dict[str, Any]) -> None:
    """Add a part of a choice to what there is of it: texts and lists grow, and None adds nothing."""
    for name, value in part.items():
        before = whole.get(name)
        if isinstance(before, dict) and value is not None:
            extend(before, value)
        elif isinstance(before, list) and value is not None:
            before += value
        elif isinstance(before, str) and value is not None:
            whole[name] = before + value
        elif value is not None or name not in whole:
            whole[name] = value
