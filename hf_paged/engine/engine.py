"""The engine: add, step, abort. One step reads as one line of calls: schedule, launch, land."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Sequence

import torch

from hf_paged.config import PagedConfig
from hf_paged.engine import admission, recovery
from hf_paged.engine import batch as batches
from hf_paged.engine.batch_sampler import BatchSampler
from hf_paged.engine.in_flight import InFlightStep
from hf_paged.engine.observe import Observers
from hf_paged.engine.output import Outputs
from hf_paged.engine.pool import Pool
from hf_paged.engine.runner import Runner
from hf_paged.engine.sampler import Sampler
from hf_paged.engine.scheduler import FCFSScheduler
from hf_paged.engine.staging import on_device
from hf_paged.errors import EngineClosedError, InvalidRequestError, RequestAbortedError, RequestRejectedError
from hf_paged.protocols import AttentionBackend, CachePolicy, LogitsProcessor, PagedModel, StepObserver
from hf_paged.request import Reject, Request
from hf_paged.stats import CacheStats

logger = logging.getLogger(__name__)


class Engine:
    """Carries requests over one model. Not thread-safe: see `thread.EngineThread` for many callers.

    Args:
        model: maps batches to logits.
        backend: attention over the paged cache.
        config: its options.
        scheduler: the class that orders requests.
        policy: in which order cached blocks are given up.
        processors: run on the logits before any sampler, in order.
        observers: called after each step that landed; a step whose requests have all ended is dropped.
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
        self.outputs = Outputs(self.scheduler, finished)
        # A CPU computes a step while it is launched: there is nothing to run ahead of.
        self._runs_ahead = model.spec.device.type != "cpu" if run_ahead is None else run_ahead
        self._builder = batches.BatchBuilder(config.block_size, len(self.pool.tables.pools), model.spec.device)
        self._longest = min(self.pool.longest, self.max_model_len or self.pool.longest)
        self.runner = Runner(model, backend, config, batches.table_width(self._longest, config.block_size))
        self.scheduler.pace = self.runner.prompt_tokens
        batch_sampler = BatchSampler(seed, getattr(backend, "sampling", None))
        self._sampler = Sampler(batch_sampler, processors, ahead=self._runs_ahead)
        self._in_flight: InFlightStep | None = None
        self._observers = Observers(observers, self.pool.tables)
        self._admit = admit
        self._fingerprint: Hashable = None
        self._graph_key: Hashable = None
        self.closed = False  # whether it takes no more requests

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
        if self.closed:
            raise EngineClosedError("this engine is closed; build a new one")
        if request.request_id in self.outputs.requests:
            raise InvalidRequestError(f"request id {request.request_id!r} is taken by a request that still runs")
        self.check_request(request)
        rejection = self._admit(request) if self._admit else None
        if rejection is not None:
            raise RequestRejectedError(rejection.reason, rejection.retry_after)
        if request.params.prompt_logprobs is not None:
            request.prompt_logprobs = [None]  # nothing comes before the first token
        most = len(request.prompt_token_ids) + (request.params.max_tokens or self._longest)
        request.limit = min(most, self._longest)
        request.runs_ahead = self._sampler.runs_ahead(request)
        self.scheduler.add(request)
        self.outputs.requests[request.request_id] = request

    def abort(self, request: Request) -> None:
        """Drop a request; its blocks are free at once. Does nothing for one that has finished."""
        error = RequestAbortedError(f"request {request.request_id!r} was aborted")
        self.outputs.finish(request, "abort", error=error)

    def push(self, request: Request, token: int, *, stop: bool = False) -> None:
        """Give a request that awaits its token the next one, chosen by its caller; `stop` ends it with that token."""
        self.outputs.append(request, token, stop=stop)

    # ------------------------------------------------------------------------------------------------------------- step

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self._in_flight is not None or self.scheduler.has_work

    @property
    def has_requests(self) -> bool:
        """Whether a request has not finished; it may await its token."""
        return bool(self.outputs.requests)

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
        current = self._in_flight or self._launch(self._schedule(None), None)
        if current is None:
            return []
        self._in_flight = current
        runs_ahead = self._runs_ahead and not self.scheduler.serves_apart
        following = self._launch(self._schedule(current), current) if runs_ahead else None
        if self._in_flight is current:  # otherwise the launch failed, and the step was landed before the recovery
            self._land(current)
        if self._in_flight is current:
            # Drop it if all its requests have ended: waiting for it would delay the next step.
            self._in_flight = following if following is not None and following.is_wanted else None
        return [row.request for row in current.step.rows]

    def _schedule(self, ahead: InFlightStep | None) -> InFlightStep | None:
        """The next step, to be launched while `ahead` is in flight. None: nothing can be served now."""
        began = time.monotonic()
        try:
            self.pool.provide([*self.scheduler.running, *self.scheduler.waiting][: 2 * self.config.max_num_seqs])
        except Exception as error:  # no memory for a pool: each request hears of it when it is its turn
            self.outputs.finish(self.scheduler.first_ready(), "error", error=error)
            return None
        step = self.scheduler.schedule()
        if not step.rows and ahead is None:
            recovery.refuse_too_long(self)
        return InFlightStep(step, began) if step.rows else None

    def _launch(self, launching: InFlightStep | None, ahead: InFlightStep | None) -> InFlightStep | None:
        """Launch a step, if there is one, while `ahead` is in flight. None: it failed."""
        if launching is None:
            return None
        step = launching.step
        try:
            batch = self._builder.build(step, layout=self.runner.layout(step), ahead=ahead)
            self._sampler.launch(launching, batch, self.runner.forward(step, batch, self.pool.cache))
        except Exception as error:
            if ahead is not None:
                self._land(ahead)
            recovery.recover(self, step, error)
            return None
        self.scheduler.launched(step)
        launching.queues = len(self.scheduler.running), len(self.scheduler.waiting)
        for row in step.rows:
            row.request.metrics.first_scheduled_time = row.request.metrics.first_scheduled_time or launching.began
        return launching

    def _land(self, landing: InFlightStep) -> None:
        """Wait for a step's tokens, and act on them."""
        try:
            tokens = landing.sampled.wait() if landing.sampled is not None else []
        except Exception as error:
            recovery.recover(self, landing.step, error)
            return
        for row in landing.step.rows:
            row.request.num_ahead = max(0, row.request.num_ahead - row.samples)
        self.scheduler.commit(landing.step)
        for request, index in landing.sampled_index.items():
            self.outputs.append(request, tokens[index])
        self.outputs.add_prompt_logprobs(landing)
        for requests, logits, choice in self._sampler.land(landing):
            self.outputs.append_all(requests, logits, choice)
        self._observers.tell(landing)

    # ------------------------------------------------------------------------------------------------ weights, recovery

    def refresh(self) -> None:
        """Void the prefix cache if the weights may have changed since it was filled; called before a caller's work."""
        fingerprint = self.model.fingerprint()
        if fingerprint != self._fingerprint:
            self.forget()
            if torch.is_autocast_enabled(self.model.spec.device.type):
                torch.clear_autocast_cache()  # it holds casts of the old weights
            self._fingerprint = fingerprint
        graph_key = self.model.graph_key()
        if graph_key != self._graph_key:
            self.runner.forget_graphs()
            self._graph_key = graph_key

    def forget(self) -> None:
        """Void the prefix cache."""
        self.pool.tables.forget()

    def restart(self) -> None:
        """Drop the step in flight and every block; requests keep their tokens, and are computed again from these."""
        self._in_flight = None
        self.scheduler.restart(self.outputs.requests.values())

    def fail(self, error: BaseException) -> None:
        """End every request with an error, after a step that raised what is no request's fault."""
        try:
            self.restart()
        except Exception:
            logger.exception("the engine can't be restarted; it is closed")
            self.closed = True
        for request in list(self.outputs.requests.values()):
            try:
                self.outputs.finish(request, "error", error=error)
            except BaseException:
                logger.exception("a callback of request %r failed as it was told of an error", request.request_id)
                self.outputs.requests.pop(request.request_id, None)

    # ----------------------------------------------------------------------------------------------------------- memory

    @property
    def stats(self) -> CacheStats:
        """How the KV pool is and was used."""
        return self.pool.stats(self.scheduler.num_preemptions)

    def release_memory(self) -> None:
        """Give the KV pool's memory back, unless there are requests. It is made again when one comes."""
        if not self.has_requests and self.pool.exists:
            self._release()

    def close(self) -> None:
        """Abort what runs and give the memory back. Using the engine afterwards raises EngineClosedError."""
        for request in list(self.outputs.requests.values()):
            self.abort(request)
        self._release()
        self.closed = True

    def warm_up(self) -> None:
        """Make the KV pool, capture every CUDA graph, launch the largest step and sample from logits now.

        Where the memory doesn't suffice, steps are smaller from now on.
        """
        with on_device(self.model.spec.device), torch.no_grad():
            self.refresh()
            self.pool.provide([])
            recovery.retry_smaller(self, self._warm_up)

    def _warm_up(self, tokens: int) -> None:
        self.runner.warm_up(self.pool.cache, tokens)
        self._sampler.warm_up(self.model, self.config.max_num_seqs)

    def _release(self) -> None:
        self._in_flight = None
        self.runner.forget_graphs()
        self.pool.release()


def _shortest(*limits: int | None) -> int | None:
    given = [limit for limit in limits if limit is not None]
    return min(given) if given else None
