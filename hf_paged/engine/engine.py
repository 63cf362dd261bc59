"""The engine: add, step, abort. One step reads as one line of calls."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Sequence

import torch

from hf_paged.config import PagedConfig
from hf_paged.engine import admission
from hf_paged.engine import batch as batches
from hf_paged.engine.chooser import Chooser
from hf_paged.engine.flight import Flight, Mark
from hf_paged.engine.logprobs import add_output_logprobs, add_prompt_logprobs, trim_logprobs
from hf_paged.engine.pool import Pool
from hf_paged.engine.runner import Runner
from hf_paged.engine.sampler import BatchSampler
from hf_paged.engine.scheduler import FCFSScheduler
from hf_paged.engine.staging import on_device
from hf_paged.errors import (
    EngineClosedError,
    InvalidRequestError,
    RequestAbortedError,
    RequestRejectedError,
    is_out_of_memory,
)
from hf_paged.protocols import AttentionBackend, CachePolicy, LogitsProcessor, PagedModel, StepObserver
from hf_paged.types import CacheStats, FinishReason, Reject, Request, Sampled, Step, StepStats

logger = logging.getLogger(__name__)

SMALLEST_STEP = 64  # tokens; a step that is smaller is not halved when the memory runs out


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
        run_ahead: whether a step is launched before the one before it has landed; None: on everything but a CPU.
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
        run_ahead: bool | None = None,
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
        # A CPU computes a step while it is launched: there is nothing to run ahead of.
        self._runs_ahead = model.spec.device.type != "cpu" if run_ahead is None else run_ahead
        self._builder = batches.BatchBuilder(config.block_size, len(self.pool.tables.pools), model.spec.device)
        self._longest = min(self.pool.longest, self.max_model_len or self.pool.longest)
        self._runner = Runner(model, backend, config, batches.table_width(self._longest, config.block_size))
        self.scheduler.pace = self._runner.prompt_tokens
        sampler = BatchSampler(seed, getattr(backend, "sampling", None))
        self._chooser = Chooser(sampler, processors, ahead=self._runs_ahead)
        self._flight: Flight | None = None  # the step that is launched, and hasn't landed
        self._landed = 0.0  # when the last one landed, in seconds of `time.monotonic()`
        self._observers = list(observers)
        self._admit = admit
        self._told_finished = finished
        self._requests: dict[str, Request] = {}
        # Requests whose last token is kept but not yet acted on: their length before it, and whether it ends them.
        self._unsettled: dict[Request, tuple[int, bool]] = {}
        self._fingerprint: Hashable = None
        self._graph_key: Hashable = None
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
        most = len(request.prompt_token_ids) + (request.params.max_tokens or self._longest)
        request.limit = min(most, self._longest)
        request.runs_ahead = self._chooser.runs_ahead(request)
        self.scheduler.add(request)
        self._requests[request.request_id] = request

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests."""
        return self._closed

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
        return self._flight is not None or self.scheduler.has_work

    def step(self) -> list[Request]:
        """Land one batch. Returns the requests of its rows; none, if there was nothing to do or its forward raised.

        On a GPU the batch after it is launched first, with tokens that the host doesn't know yet, so that the device
        doesn't wait for the host. A request's end is found one step late there; what was computed beyond it is dropped.

        A forward that raises is tried again with fewer requests, down to the one at fault, which alone is failed.
        """
        # Not inference mode: what the model keeps of its own (rotary tables that grow) must stay usable in training.
        with on_device(self.model.spec.device), torch.no_grad():
            return self._step()

    def run(self, requests: Sequence[Request]) -> None:
        """Carry requests to their end, with whatever else there is.

        Raises:
            whatever ended the first of them that failed.
        """
        for request in requests:
            self.add(request)
        while self.has_work:
            self.step()
        for request in requests:
            if request.error is not None:
                raise request.error

    def _step(self) -> list[Request]:
        flight = self._flight or self._launch(None)
        if flight is None:
            return []
        self._flight = flight
        following = self._launch(flight) if self._runs_ahead and not self.scheduler.serves_apart else None
        if self._flight is flight:  # else it has landed already, for the launch failed, and the books are begun anew
            self._land(flight)
        if self._flight is flight:
            self._flight = following
        return [row.request for row in flight.step.rows]

    def _launch(self, ahead: Flight | None) -> Flight | None:
        """Schedule the next step and launch it; `ahead` is still under way. None: nothing was launched."""
        began = time.monotonic()
        self.pool.provide([*self.scheduler.running, *self.scheduler.waiting][: 2 * self.config.max_num_seqs])
        step = self.scheduler.schedule()
        if not step.rows:
            if ahead is None:
                self._give_up()
            return None
        try:
            flight = self._forward(step, ahead, began)
        except Exception as error:
            if ahead is not None:
                self._land(ahead)
            self._isolate(step, error)
            return None
        self.scheduler.launched(step)
        flight.queues = len(self.scheduler.running), len(self.scheduler.waiting)
        for row in step.rows:
            row.request.metrics.first_scheduled_time = row.request.metrics.first_scheduled_time or began
        return flight

    def _forward(self, step: Step, ahead: Flight | None, began: float) -> Flight:
        if ahead is not None and ahead.mark is not None:
            ahead.mark.come_after()
        chosen = None if ahead is None or ahead.chosen is None else ahead.chosen.on_device
        places = ahead.places if ahead is not None else None
        batch = self._builder.build(step, layout=self._runner.layout(step), chosen=chosen, places=places)
        flight = Flight(step, began)
        self._chooser.launch(flight, batch, self._runner.forward(step, batch, self.pool.cache))
        flight.mark = Mark(self.model.spec.device)
        return flight

    def _land(self, flight: Flight) -> None:
        """Wait for a step's tokens, and act on them."""
        try:
            if flight.mark is not None:
                flight.mark.come_after()
            tokens = flight.chosen.wait() if flight.chosen is not None else []
        except Exception as error:
            self._isolate(flight.step, error)
            return
        for row in flight.step.rows:
            row.request.num_ahead = max(0, row.request.num_ahead - row.samples)
        self.scheduler.commit(flight.step)
        known = {request: tokens[place] for request, place in flight.places.items() if not request.finished}
        self._append_all([(request, token, False) for request, token in known.items()])
        self._add_prompt_logprobs(flight)
        for requests, logits, choice in self._chooser.land(flight):
            self._apply(requests, logits, choice)
        self._observe(flight)

    def recover(self) -> None:
        """A step was broken off, anywhere: its books are begun anew, and the running requests computed again.

        What survives is which requests there are, and their tokens. One that was about to finish, or had a token that
        was not acted on, goes on from there. Broken off itself, it can be called again.
        """
        self._flight = None
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
        graph_key = self.model.graph_key()
        if graph_key != self._graph_key:
            self._runner.forget_graphs()
            self._graph_key = graph_key

    def forget(self) -> None:
        """Void the prefix cache."""
        self.pool.tables.forget()

    @property
    def holds_memory(self) -> bool:
        """Whether there is a KV pool that no request needs."""
        return not self._requests and self.pool.exists

    def release_memory(self) -> None:
        """Give the KV pool's memory back, unless there are requests. It is made anew when one comes."""
        if not self._requests:
            self._release()

    def close(self) -> None:
        """Abort what runs and give the memory back. Using the engine afterwards raises EngineClosedError."""
        for request in list(self._requests.values()):
            self.abort(request)
        self._release()
        self._closed = True

    def warm_up(self) -> None:
        """Make the KV pool, capture every CUDA graph, launch the largest step and choose from logits now.

        Where the memory doesn't suffice, steps are smaller from now on.
        """
        with on_device(self.model.spec.device), torch.no_grad():
            self.refresh()
            self.pool.provide([])
            while True:
                tokens = self.scheduler.max_num_batched_tokens
                try:
                    self._runner.warm_up(self.pool.cache, tokens)
                    self._chooser.warm_up(self.model, self.config.max_num_seqs)
                    return
                except Exception as error:
                    if not is_out_of_memory(error) or not self._shrink(tokens, error):
                        raise

    def _release(self) -> None:
        self._flight = None
        self._runner.forget_graphs()
        self.pool.release()

    @property
    def stats(self) -> CacheStats:
        """How the KV pool is and was used."""
        return self.pool.stats(self.scheduler.num_preemptions)

    # ------------------------------------------------------------------------------------------------------------ parts

    def _isolate(self, step: Step, error: Exception) -> None:
        """The forward of this step raised: fail the request that is alone, else try them again in two halves.

        Where the memory ran out, steps are smaller from now on.
        """
        requests = [row.request for row in step.rows if not row.request.finished]
        self.recover()
        if is_out_of_memory(error) and self._shrink(step.num_tokens, error):
            return
        if len(step.rows) == 1:
            for request in requests:
                self._finish(request, "error", error=error)
        elif len(requests) == 1:  # a row that has ended meanwhile may be at fault
            self.scheduler.serve_apart(requests)
        else:
            middle = len(requests) // 2
            self.scheduler.serve_apart(requests[:middle], requests[middle:])

    def _shrink(self, tokens: int, error: Exception) -> bool:
        """A step of so many tokens ran out of memory: have steps of half as many, if these weren't few already."""
        half = tokens // 2
        if half < SMALLEST_STEP:
            return False
        self._runner.forget_graphs()
        self.scheduler.max_num_batched_tokens = half
        self.scheduler.max_num_seqs = min(self.scheduler.max_num_seqs, half)
        if self.model.spec.device.type == "cuda":
            torch.cuda.empty_cache()
        logger.warning("out of memory in a step of %d tokens; steps have %d at most from now on: %s",
                       tokens, half, error)  # fmt: skip
        return True

    def _add_prompt_logprobs(self, flight: Flight) -> None:
        index = 0
        for row in flight.step.rows if flight.logits is not None else ():
            if batches.wants_prompt_logprobs(row):
                assert flight.logits is not None
                try:
                    add_prompt_logprobs(row, flight.logits[index : index + row.count])
                except Exception as error:  # concerns this request alone
                    self._finish(row.request, "error", error=error)
                index += row.count - row.samples
            index += row.samples

    def _apply(self, requests: Sequence[Request], logits: torch.Tensor, choice: Sampled | Exception) -> None:
        """Keep the tokens that a sampler chose, with their log-probabilities, or hold or fail the requests."""
        if isinstance(choice, Exception):
            for request in requests:
                self._finish(request, "error", error=choice)
            return
        given: list[tuple[Request, int, bool]] = []
        stopped = choice.stopped or [False] * len(requests)
        for request, row, token, stop in zip(requests, logits, choice.token_ids, stopped, strict=True):
            if token is None:
                request.held = True
            elif token < 0 or self._adds_logprobs(request, row, token):
                given.append((request, token, stop))
        self._append_all(given)

    def _adds_logprobs(self, request: Request, row: torch.Tensor, token: int) -> bool:
        """Keep the token's log-probabilities; whether that succeeded. If not, the request has failed."""
        try:
            add_output_logprobs(request, row, token)
        except Exception as error:
            self._finish(request, "error", error=error)
            return False
        return True

    def _append_all(self, given: Sequence[tuple[Request, int, bool]]) -> None:
        """Keep every token, then act on them: what breaks off in a callback must not cost the others their tokens."""
        for request, token, stop in given:
            if token >= 0:
                self._append(request, token, stop)
        for request, token, _ in given:
            if token >= 0:
                self._settle(request)
            else:
                self._finish(request, "error", error=_nothing_to_draw(request))

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
        if len(request.token_ids) >= request.limit:
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
        request.held, request.num_ahead = False, 0
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

    def _observe(self, flight: Flight) -> None:
        if not self._observers:
            return
        step, landed = flight.step, time.monotonic()
        decode = sum(row.count == 1 and row.start >= len(row.request.prompt_token_ids) for row in step.rows)
        tables = self.pool.tables
        stats = StepStats(
            num_running=flight.queues[0],
            num_waiting=flight.queues[1],
            num_prefill_tokens=step.num_tokens - decode,
            num_decode_tokens=decode,
            num_preempted=len(step.preempted),
            kv_usage=tables.usage,
            prefix_queries=tables.prefix_queries,
            prefix_hits=tables.prefix_hits,
            duration=landed - max(flight.began, self._landed),
        )
        self._landed = landed
        for observer in self._observers:
            observer(stats)


def _nothing_to_draw(request: Request) -> InvalidRequestError:
    return InvalidRequestError(
        f"request {request.request_id!r}: no token may be drawn as token {request.num_output + 1} of the output; "
        "allowed_token_ids, bad_words, min_tokens and structured outputs together forbid all of them"
    )


def _shortest(*limits: int | None) -> int | None:
    given = [limit for limit in limits if limit is not None]
    return min(given) if given else None
