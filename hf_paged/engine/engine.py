"""The engine: add, step, abort. One step reads as one line of calls."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Sequence

import torch

from hf_paged.config import PagedConfig
from hf_paged.engine import admission
from hf_paged.engine import batch as batches
from hf_paged.engine.logprobs import add_output_logprobs, add_prompt_logprobs, trim_logprobs
from hf_paged.engine.pool import Pool
from hf_paged.engine.runner import Runner
from hf_paged.engine.sampler import BatchSampler
from hf_paged.engine.scheduler import FCFSScheduler
from hf_paged.errors import EngineClosedError, InvalidRequestError, RequestAbortedError, RequestRejectedError
from hf_paged.protocols import AttentionBackend, CachePolicy, LogitsProcessor, PagedModel, StepObserver, TokenSampler
from hf_paged.types import Batch, CacheStats, FinishReason, Reject, Request, Sampled, StepStats


class Engine:
    """Carries requests over one model. Not thread-safe: see `driver.Driver` for many callers.

    Args:
        model: maps batches to logits.
        backend: attention over the paged cache.
        config: its options.
        scheduler: the class that orders requests.
        policy: in which order cached blocks are given up.
        processors: run on the logits before any sampler, in order.
        observers: called after each step.
        admit: asked before a request is taken; None or a Reject.
        finished: told of each request that finished, after its blocks were freed.
        seed: of the draws of requests without a seed of their own.
    """

    def __init__(
        self,
        model: PagedModel,
        backend: AttentionBackend,
        config: PagedConfig,
        *,
        scheduler: type[FCFSScheduler] = FCFSScheduler,
        policy: CachePolicy | None = None,
        processors: Sequence[LogitsProcessor] = (),
        observers: Sequence[StepObserver] = (),
        admit: Callable[[Request], Reject | None] | None = None,
        finished: Callable[[Request], None] | None = None,
        seed: int | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.max_model_len = _shortest(config.max_model_len, model.max_positions)
        self.pool = Pool(model.spec, backend, config, self.max_model_len, policy)
        self.scheduler = scheduler(
            self.pool.tables,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=self.pool.chunk,
            max_model_len=self.max_model_len,
        )
        self._runner = Runner(model, backend)
        self._sampler = BatchSampler(seed)
        self._processors = tuple(processors)
        self._observers = list(observers)
        self._admit = admit
        self._told_finished = finished
        self._longest = min(self.pool.longest, self.max_model_len or self.pool.longest)
        self._requests: dict[str, Request] = {}
        # Requests whose last token is kept but not yet acted on: their length before it, and whether it ends them.
        self._unsettled: dict[Request, tuple[int, bool]] = {}
        self._fingerprint: Hashable = None
        self._closed = False

    # ---------------------------------------------------------------------------------------------------- add and abort

    def check_request(self, request: Request) -> None:
        """Refuse a request that could never be served; see `admission.check`. May be called from any thread."""
        admission.check(request, self.model, self.max_model_len, self.pool)

    def add(self, request: Request) -> None:
        """Take a request.

        Raises:
            InvalidRequestError: it could never be served, or its id is taken.
            RequestRejectedError: a plugin turned it away.
            EngineClosedError: the engine is closed.
        """
        if self._closed:
            raise EngineClosedError("this engine is closed; build a new one")
        if request.request_id in self._requests:
            raise InvalidRequestError(f"request id {request.request_id!r} is taken by a request that still runs")
        self.check_request(request)
        rejection = self._admit(request) if self._admit else None
        if rejection is not None:
            raise RequestRejectedError(rejection.reason, rejection.retry_after)
        if request.params.prompt_logprobs is not None:
            request.prompt_logprobs = [None]  # nothing comes before the first token
        self.scheduler.add(request)
        self._requests[request.request_id] = request

    def carries(self, request: Request) -> bool:
        """Whether the engine has taken this very request, and it has not finished."""
        return self._requests.get(request.request_id) is request

    def abort(self, request: Request) -> None:
        """Drop a request; its blocks are free at once. Does nothing for one that has finished."""
        self._finish(request, "abort", error=RequestAbortedError(f"request {request.request_id!r} was aborted"))

    def push(self, request: Request, token: int, *, stop: bool = False) -> None:
        """Give a held request its next token, chosen by its caller; `stop` ends it with that token."""
        self._append(request, token, stop)
        self._settle(request)

    # ------------------------------------------------------------------------------------------------------------- step

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_work

    def step(self) -> list[Request]:
        """Compute one batch. Returns the requests that it brought forward; an empty list: there was nothing to do.

        A forward that raises is tried again with fewer requests, down to the one at fault, which alone is failed.
        """
        began = time.monotonic()
        self.pool.provide([*self.scheduler.running, *self.scheduler.waiting][: 2 * self.config.max_num_seqs])
        step = self.scheduler.schedule()
        if not step.rows:
            self._give_up()
            return []
        try:
            batch = batches.build(step, self.config.block_size, len(self.pool.tables.pools), self.model.spec.device)
            logits = self._runner.forward(step, batch, self.pool.cache)
        except Exception as error:
            self._isolate([row.request for row in step.rows], error)
            return []
        self.scheduler.commit(step)
        for row in step.rows:
            row.request.metrics.first_scheduled_time = row.request.metrics.first_scheduled_time or began
        self._sample(batch, logits)
        self._observe(batch, len(step.preempted), began)
        return [row.request for row in batch.rows]

    def recover(self) -> None:
        """A step was broken off, anywhere: its books are begun anew, and the running requests computed again.

        What survives is which requests there are, and their tokens. One that was about to finish, or had a token that
        was not acted on, goes on from there. Broken off itself, it can be called again.
        """
        self.scheduler.restart(self._requests.values())
        for request in list(self._requests.values()):
            trim_logprobs(request)
            if request.finish_reason is not None:
                self._finish(request, request.finish_reason, stop_reason=request.stop_reason, error=request.error)
        for request in list(self._unsettled):
            try:
                self._settle(request)
            except BaseException as error:  # broken off here before: its own doing, or nobody would ever get on
                self._finish(request, "error", error=error)
                self._unsettled.pop(request, None)
                raise

    def refresh(self) -> None:
        """Void the prefix cache if the weights may have changed since it was filled; called before a caller's work."""
        fingerprint = self.model.fingerprint()
        if fingerprint != self._fingerprint:
            self.forget()
            self._fingerprint = fingerprint

    def forget(self) -> None:
        """Void the prefix cache."""
        self.pool.tables.forget()

    def release_memory(self) -> None:
        """Give the KV pool's memory back, unless there are requests. It is made anew when one comes."""
        if not self._requests:
            self.pool.release()

    def close(self) -> None:
        """Abort what runs and give the memory back. Using the engine afterwards raises EngineClosedError."""
        for request in list(self._requests.values()):
            self.abort(request)
        self.pool.release()
        self._closed = True

    @property
    def stats(self) -> CacheStats:
        """How the KV pool is and was used."""
        return self.pool.stats(self.scheduler.num_preemptions)

    # ------------------------------------------------------------------------------------------------------------ parts

    def _isolate(self, requests: Sequence[Request], error: Exception) -> None:
        """The forward over these requests raised: fail the one that is alone, else try them again in two halves."""
        self.recover()
        if len(requests) == 1:
            self._finish(requests[0], "error", error=error)
        else:
            middle = len(requests) // 2
            self.scheduler.serve_apart(requests[:middle], requests[middle:])

    def _sample(self, batch: Batch, logits: torch.Tensor) -> None:
        """Choose tokens, each sampler for its own requests in one go. One that raises fails its requests alone."""
        groups: dict[TokenSampler, list[tuple[Request, int]]] = {}
        index = 0
        for row in batch.rows:
            if batches.wants_prompt_logprobs(row):
                add_prompt_logprobs(row, logits[index : index + row.count])
                index += row.count - row.samples
            if row.samples:
                groups.setdefault(row.request.sampler or self._sampler, []).append((row.request, index))
                index += 1
        for sampler, members in groups.items():
            members = [member for member in members if not member[0].finished]  # what a callback has aborted by now
            requests, rows = [request for request, _ in members], [row for _, row in members]
            chosen = logits if len(rows) == len(logits) else logits[rows]
            try:
                sampled = sampler.sample(requests, self._processed(requests, chosen))
                if len(sampled.token_ids) != len(requests):
                    raise ValueError(f"{sampler!r} gave {len(sampled.token_ids)} tokens for {len(requests)} requests")
            except Exception as error:
                for request in requests:
                    self._finish(request, "error", error=error)
            else:
                self._apply(requests, chosen, sampled)

    def _processed(self, requests: Sequence[Request], logits: torch.Tensor) -> torch.Tensor:
        concerned = [processor for processor in self._processors if _concerns(processor, requests)]
        if concerned:
            logits = logits.float().clone()  # log-probabilities are those of the raw ones
        for processor in concerned:
            logits = processor.process(requests, logits)
        return logits

    def _apply(self, requests: Sequence[Request], logits: torch.Tensor, sampled: Sampled) -> None:
        """Keep every token, then act on them: what breaks off in a callback must not cost the others their tokens."""
        stopped = sampled.stopped or [False] * len(requests)
        for request, row, token, stop in zip(requests, logits, sampled.token_ids, stopped, strict=True):
            if token is None:
                request.held = True
            else:
                add_output_logprobs(request, row, token)
                self._append(request, token, stop)
        for request, token in zip(requests, sampled.token_ids, strict=True):
            if token is not None:
                self._settle(request)

    def _append(self, request: Request, token: int, stop: bool) -> None:
        self._unsettled[request] = (len(request.token_ids), stop)
        request.token_ids.append(token)
        if request.metrics.first_token_time is None:
            request.metrics.first_token_time = time.monotonic()

    def _settle(self, request: Request) -> None:
        """Act on a request's new token: it is told, or it ends. What its callbacks raise is its own end."""
        length, stop = self._unsettled[request]
        if len(request.token_ids) > length and not request.finished:
            request.held, error = False, None
            try:
                reason, what = self._reason_to_stop(request, request.token_ids[-1], stop)
                if reason is None:
                    del self._unsettled[request]  # before the call: nobody is told twice
                    if request.on_token is not None:
                        request.on_token(request)
            except Exception as raised:
                reason, what, error = "error", None, raised
            if reason is not None:
                self._finish(request, reason, stop_reason=what, error=error)
        self._unsettled.pop(request, None)

    def _give_up(self) -> None:
        """Nothing could be served. If nothing holds a block, the next request never can be: the pool can't grow."""
        if self.scheduler.running or not self.has_work:
            return
        request = self.scheduler.first_ready()
        error = InvalidRequestError(
            f"request {request.request_id!r} has {len(request.token_ids)} tokens, more than the KV pool can hold "
            f"({self.pool.stats(0).num_blocks} blocks of {self.config.block_size} tokens); shorten it, or free memory"
        )
        self._finish(request, "error", error=error)

    def _reason_to_stop(self, request: Request, token: int, stop: bool) -> tuple[FinishReason | None, str | int | None]:
        params = request.params
        complete = request.constraint is not None and request.constraint.advance(request)
        if request.num_output >= params.min_tokens:
            if token in request.eos_token_ids and not params.ignore_eos:
                return "stop", None
            if token in (params.stop_token_ids or ()):
                return "stop", token
            found = request.stop_check(request) if request.stop_check else None
            if found is not None:
                return "stop", found
        if complete:  # whatever its length: nothing can follow
            return "stop", None
        # A sampler that stops at the length too means that.
        if len(request.token_ids) >= self._longest or request.num_output >= (params.max_tokens or math.inf):
            return "length", None
        return ("stop", None) if stop else (None, None)

    def _finish(
        self,
        request: Request,
        reason: FinishReason,
        *,
        stop_reason: str | int | None = None,
        error: BaseException | None = None,
    ) -> None:
        if not self.carries(request):
            return
        request.finish_reason, request.stop_reason, request.error = reason, stop_reason, error
        request.held = False
        request.metrics.finished_time = time.monotonic()
        self.scheduler.remove(request)
        del self._requests[request.request_id]
        if request.on_token is not None:
            try:
                request.on_token(request)
            except Exception as raised:
                request.error = request.error or raised
        if self._told_finished is not None:
            self._told_finished(request)

    def _observe(self, batch: Batch, preempted: int, began: float) -> None:
        if not self._observers:
            return
        decode = sum(row.count == 1 and row.start >= len(row.request.prompt_token_ids) for row in batch.rows)
        tables = self.pool.tables
        stats = StepStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_prefill_tokens=len(batch.input_ids) - decode,
            num_decode_tokens=decode,
            num_preempted=preempted,
            kv_usage=tables.usage,
            prefix_queries=tables.prefix_queries,
            prefix_hits=tables.prefix_hits,
            duration=time.monotonic() - began,
        )
        for observer in self._observers:
            observer(stats)


def _concerns(processor: LogitsProcessor, requests: Sequence[Request]) -> bool:
    """Whether a processor would change anything in this batch; see `LogitsProcessor`."""
    concerns = getattr(processor, "concerns", None)
    return concerns is None or any(map(concerns, requests))


def _shortest(*limits: int | None) -> int | None:
    given = [limit for limit in limits if limit is not None]
    return min(given) if given else None
