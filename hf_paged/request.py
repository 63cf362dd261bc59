"""A request, what it carries, and what comes of it."""

from __future__ import annotations

import dataclasses
import enum
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from hf_paged.params import SamplingParams

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length", "abort", "error"]


class Status(enum.Enum):
    """Where a request is."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclasses.dataclass
class RequestMetrics:
    """When things happened to a request, in seconds of `time.monotonic()`.

    Attributes:
        arrival_time: when it was asked for; of one that comes through the server, when the call came.
    """

    arrival_time: float = dataclasses.field(default_factory=time.monotonic)
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0


@dataclasses.dataclass(eq=False)
class Request:
    """One sequence that the engine carries. The upper part is the caller's, the lower one the engine's.

    Attributes:
        request_id: unique among the requests of an engine.
        prompt_token_ids: what the caller gave, at least one id.
        params: how tokens are chosen and when to stop.
        eos_token_ids: ids that end the output unless `params.ignore_eos`.
        sampler: who turns its logits into a token; None: the engine's own sampler.
        priority: lower runs first, under the scheduler "priority"; a level is worth a minute of waiting.
        banned: token sequences that must not be produced (`params.bad_words`, tokenised).
        cache_key: tokens are only shared with requests of the same key (an adapter's name, an image's hash).
        parent: an earlier request with the same prompt, whose blocks it shares once they are computed.
        resume_from: output that it has already, from an engine that is gone; it goes on with the next token.
        on_token: called with the request after each new token and when it finishes; runs in the engine's thread.
        constraint: what the output has to be like; set by a plugin, as the hook `constrain_request` says.
        stop_check: called after each new token; returns the reason to stop (a string or an id), or None to go on.

        token_ids: prompt and output so far, as far as the host knows them.
        num_ahead: tokens after those, sampled by steps in flight and not yet on the host.
        num_computed: tokens, of both kinds, that have keys and values in the cache.
        runs_ahead: whether its next step can be launched before the host knows the token of the last one.
        limit: most tokens that it may ever have, prompt and output.
        tables: for each cache group, the block ids in order; the null block where a window has moved on.
        num_cached: prompt tokens that the prefix cache gave, at the first admission.
        held: its logits were handed out, and it waits for `Engine.push`.
        logprobs, prompt_logprobs: a dict of id -> Logprob for each token, where asked for; none for `resume_from`.
        error: what ended it, if its finish reason is "error".
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    eos_token_ids: frozenset[int] = frozenset()
    sampler: TokenSampler | None = None
    priority: int = 0
    banned: tuple[tuple[int, ...], ...] = ()
    cache_key: Hashable = None
    parent: Request | None = None
    resume_from: Sequence[int] = ()
    on_token: Callable[[Request], None] | None = None
    stop_check: Callable[[Request], str | int | None] | None = None
    constraint: Constraint | None = None

    token_ids: list[int] = dataclasses.field(init=False)
    status: Status = Status.WAITING
    order: int = -1
    num_ahead: int = 0
    num_computed: int = 0
    runs_ahead: bool = False
    limit: int = sys.maxsize
    tables: list[list[int]] = dataclasses.field(default_factory=list)
    block_keys: list[bytes] = dataclasses.field(default_factory=list)
    num_cached: int | None = None
    held: bool = False
    logprobs: list[dict[int, Logprob]] | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: BaseException | None = None
    metrics: RequestMetrics = dataclasses.field(default_factory=RequestMetrics)

    def __post_init__(self) -> None:
        self.token_ids = [*self.prompt_token_ids, *self.resume_from]

    @property
    def output_token_ids(self) -> list[int]:
        """The new tokens so far."""
        return self.token_ids[len(self.prompt_token_ids) :]

    @property
    def num_output(self) -> int:
        """How many new tokens there are."""
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far, those counted that only the device knows."""
        return len(self.token_ids) + self.num_ahead

    @property
    def num_pending(self) -> int:
        """Tokens whose keys and values are still to be computed."""
        return len(self.token_ids) + self.num_ahead - self.num_computed

    @property
    def finished(self) -> bool:
        """Whether the engine is done with it."""
        return self.status is Status.FINISHED


@dataclasses.dataclass
class Sampled:
    """What a sampler made of a few rows of logits.

    Attributes:
        token_ids: a token for each row, or None where the row is handed out and waits for `Engine.push`.
        stopped: for each row, whether it ends with this token; None: the sampler doesn't decide that.
    """

    token_ids: Sequence[int | None]
    stopped: Sequence[bool] | None = None


class TokenSampler(Protocol):
    """Turns logits into tokens for the requests that carry it. Called once a step with all of its rows."""

    def sample(self, requests: Sequence[Request], logits: torch.Tensor) -> Sampled:
        """Choose for each request from its row of `logits`, [rows, vocabulary] as the model gave them."""
        ...


class Constraint(Protocol):
    """What one request's output has to be like, kept in step with its tokens; see the hook `constrain_request`."""

    def advance(self, request: Request) -> bool:
        """Take in the request's new tokens; called after each, and harmless when called again.

        Returns:
            Whether the output is complete: nothing can follow, and the request ends.

        Raises:
            whatever is to end this request alone.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Logprob:
    """The log-probability of a token under the raw distribution, its rank (1 is the most likely), and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclasses.dataclass
class CompletionOutput:
    """One completion of a prompt. `error`: what ended it, where the finish reason is "error"."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: BaseException | None = None


@dataclasses.dataclass
class RequestOutput:
    """What came of one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Reject:
    """What `admit_request` returns to turn a request away.

    Attributes:
        reason: told to the caller.
        retry_after: seconds after which trying again makes sense, or None.
    """

    reason: str
    retry_after: float | None = None
