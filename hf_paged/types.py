"""The data that the floors above share: cache specs, requests, steps and batches, and what is told of them.

Who acts on it is in `protocols`, but for what a request itself carries.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from hf_paged.params import SamplingParams

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length", "abort", "error"]
NULL_BLOCK = 0  # never handed out: tables point at it where nothing is kept


class Status(enum.Enum):
    """Where a request is."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


# ---------------------------------------------------------------------------------------------- the model and its cache


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What one attention layer keeps for each token.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: size of a query and key head.
        value_head_dim: size of a value head; differs from `head_dim` under latent attention.
        window: tokens that a query sees, itself included, or None for all of them.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    window: int | None = None


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """What a model keeps for each token: one entry for each attention layer, in the order of their layer index.

    Layers with the same window are one group and share a block table.
    """

    layers: tuple[LayerSpec, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each group: full attention first, then windows from the largest down."""
        found = {layer.window for layer in self.layers}
        return tuple(sorted(found, key=lambda window: (window is not None, -(window or 0))))

    def group_of(self, layer: int) -> int:
        """The group that a layer is in."""
        return self.windows.index(self.layers[layer].window)

    def token_bytes(self, group: int | None = None) -> int:
        """Bytes of one token's keys and values, over the layers of one group or of all."""
        window = None if group is None else self.windows[group]
        layers = [layer for layer in self.layers if group is None or layer.window == window]
        return self.dtype.itemsize * sum(x.num_kv_heads * (x.head_dim + x.value_head_dim) for x in layers)


# ------------------------------------------------------------------------------------------------------------- requests


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


# ------------------------------------------------------------------------------------------------------- steps, batches


@dataclasses.dataclass(eq=False, slots=True)
class Scheduled:
    """A request's share of a step: its tokens `start` to `start + count`, counted from the start of its prompt.

    Attributes:
        end: one past the last token of the share.
        samples: whether the step brings the request up to date, so that its last logits choose a token.
        known: whether the host knows all of the tokens; else the last one is on the device alone.
    """

    request: Request
    start: int
    count: int
    end: int = dataclasses.field(init=False)
    samples: bool = dataclasses.field(init=False)
    known: bool = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.end = self.start + self.count
        self.samples = self.end == self.request.num_tokens
        self.known = self.end <= len(self.request.token_ids)


@dataclasses.dataclass
class Step:
    """What one forward computes.

    Attributes:
        rows: the shares, in batch order.
        copies: for each cache group, the blocks to copy before the forward: (from, to).
        preempted: requests that lost their blocks to this step.
    """

    rows: list[Scheduled]
    copies: list[list[tuple[int, int]]] = dataclasses.field(default_factory=list)
    preempted: list[Request] = dataclasses.field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens of the forward."""
        return sum(row.count for row in self.rows)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The size of a batch that a CUDA graph serves: `decode` rows of one token, then `prompts` rows of any number.

    A batch that has fewer is padded: with decode rows of length 0, rows without tokens, and tokens behind the last row,
    none of which has a slot. The logits are those of each row's last token.

    Attributes:
        decode, prompts: rows.
        tokens: all of them, those of the decode rows counted.
    """

    decode: int
    tokens: int
    prompts: int

    @property
    def rows(self) -> int:
        """Rows of both kinds."""
        return self.decode + self.prompts


@dataclasses.dataclass
class Batch:
    """The tensors of one forward: T tokens of R rows, end to end, prefill and decode mixed.

    Attributes:
        rows: the shares it was built from; the length is R.
        input_ids: int64 [T].
        positions: int64 [T], the position of each token in its own sequence.
        query_start_loc: int32 [R + 1], where each row's tokens begin.
        seq_lens: int32 [R], tokens of each row that have keys after this step.
        slot_mapping: for each cache group int64 [T]: block id × block size + offset, where a token's keys are written.
        block_tables: for each cache group int32 [R, most blocks], padded with the null block.
        logits_indices: int64 [S], the flat tokens whose logits are wanted, each once; with a layout padded to
            `layout.rows`, where logits of the extra entries are ignored.
        row_starts: `query_start_loc` on the host.
        num_decode: leading rows of one token.
        fresh_from: the first of the last rows, those that read no key of an earlier step.
        sampling: the rows of `rows` that sample, each with its row of the logits.
        layout: the size that it was padded to, for a graph; None: it has the step's own.
    """

    rows: Sequence[Scheduled]
    input_ids: torch.Tensor
    positions: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    slot_mapping: list[torch.Tensor]
    block_tables: list[torch.Tensor]
    logits_indices: torch.Tensor
    row_starts: Sequence[int]
    num_decode: int
    fresh_from: int
    sampling: Sequence[tuple[Scheduled, int]] = ()
    layout: Layout | None = None


@dataclasses.dataclass(frozen=True)
class StepStats:
    """What a step observer sees, when the step's tokens are known. Host values only.

    Attributes:
        num_running, num_waiting: requests after the step was scheduled.
        num_prefill_tokens, num_decode_tokens: tokens of the step.
        num_preempted: requests preempted by the step.
        kv_usage: share of the pool's blocks that live requests hold, 0 to 1.
        prefix_queries, prefix_hits: prompt tokens looked up in the prefix cache and found, since the engine began.
        duration: seconds the step took: from its scheduling, or the end of the step before, to its last token.
    """

    num_running: int
    num_waiting: int
    num_prefill_tokens: int
    num_decode_tokens: int
    num_preempted: int
    kv_usage: float
    prefix_queries: int
    prefix_hits: int
    duration: float


@dataclasses.dataclass(frozen=True)
class CacheStats:
    """How the KV pool is used.

    Attributes:
        num_blocks: blocks of the pool, the null blocks left out, over all groups.
        num_free: of them, held by no request (some of these are kept for the prefix cache).
        pool_bytes: bytes of the pool.
        reserved_tokens: token slots handed to the requests that have finished.
        used_tokens: of them, written to.
        prefix_queries, prefix_hits: prompt tokens looked up in the prefix cache, and found there.
        num_preemptions: how often a request lost its blocks.
    """

    num_blocks: int
    num_free: int
    pool_bytes: int
    reserved_tokens: int
    used_tokens: int
    prefix_queries: int
    prefix_hits: int
    num_preemptions: int

    @property
    def waste(self) -> float:
        """Share of the reserved token slots that nothing was ever written to."""
        return 1.0 - self.used_tokens / self.reserved_tokens if self.reserved_tokens else 0.0


# -------------------------------------------------------------------------------------------------- what hooks are told


@dataclasses.dataclass(frozen=True)
class Reject:
    """What `admit_request` returns to turn a request away.

    Attributes:
        reason: told to the caller.
        retry_after: seconds after which trying again makes sense, or None.
    """

    reason: str
    retry_after: float | None = None


@dataclasses.dataclass(frozen=True)
class EngineInfo:
    """What `engine_started` and `engine_stopped` tell."""

    model: str
    config: Any
    attention_backend: str
    scheduler: str
    plugins: Mapping[str, str]
