"""The scheduler: which requests the next forward serves, and with how many tokens. No torch."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Sequence

from hf_paged.batch import Scheduled, Step
from hf_paged.engine.tables import BlockTables
from hf_paged.request import Request, Status

LEVEL = 60 * 10**9  # nanoseconds of waiting that one level of priority is worth


class FCFSScheduler:
    """First come, first served: chunked prefill mixed with decode, under a token budget and a request cap.

    Requests are ordered by `key`; the base policy is arrival. Decode rows are served first, so that a long prompt
    doesn't hold up answers that have begun. Out of blocks, the last request in the order loses its blocks and is
    computed anew later; the first one always goes on, so none starves.

    Args:
        tables: where blocks come from.
        max_num_seqs: most rows of a step.
        max_num_batched_tokens: most tokens of a step.
        max_model_len: most tokens that a request may have.

    Attributes:
        pace: how many prompt tokens a step takes at most, of so many decode rows and so many prompt tokens that could
            be served now; None: all, up to max_num_batched_tokens.
    """

    pace: Callable[[int, int], int] | None = None

    def __init__(
        self, tables: BlockTables, *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int | None = None
    ) -> None:
        self.tables = tables
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.num_preemptions = 0
        self._order = itertools.count()
        self._apart: list[set[Request]] = []

    def key(self, request: Request) -> tuple[int, ...]:
        """What requests are ordered by, smallest first. Different for each request, and fixed once it was added."""
        return (request.order,)

    @property
    def has_work(self) -> bool:
        """Whether a request could be served now."""
        self._drop_served()
        return any(self._active(r) for r in self.running) or any(self._ready(r) for r in self.waiting)

    def first_ready(self) -> Request:
        """The waiting request that is admitted next."""
        return next(request for request in self.waiting if self._ready(request))

    # ------------------------------------------------------------------------------------------------------ come and go

    def add(self, request: Request) -> None:
        """Queue a request."""
        request.order = next(self._order)
        request.status = Status.WAITING
        bisect.insort(self.waiting, request, key=self.key)

    def remove(self, request: Request) -> None:
        """Drop a request and give its blocks back."""
        queue = self.running if request.status is Status.RUNNING else self.waiting
        queue.remove(request)
        self.tables.release(request)
        request.status = Status.FINISHED

    def restart(self, requests: Iterable[Request]) -> None:
        """Take every block back from these requests, which are all that there are: they are computed again."""
        self.tables.reset([pool.num_blocks for pool in self.tables.pools])
        self.running, self.waiting = [], sorted(requests, key=self.key)
        for request in self.waiting:
            request.status, request.num_ahead, request.num_computed, request.tables = Status.WAITING, 0, 0, []

    # --------------------------------------------------------------------------------------------------------- schedule

    def schedule(self) -> Step:
        """Choose the rows of the next step and give them blocks. An empty step means that nothing can be served."""
        self._drop_served()
        step = Step(rows=[])
        shares: dict[Request, Scheduled] = {}
        active = [request for request in self.running if self._active(request)]
        budget = self._budget(active)
        self._continue_running(shares, step, active, budget)
        if not step.preempted:
            self._admit_waiting(shares, budget)
        while not shares and self._make_room(step):
            self._admit_waiting(shares, self._budget(()))
        step.rows = list(shares.values())
        step.copies = self.tables.take_copies()
        return step

    def launched(self, step: Step) -> None:
        """The step's forward is under way: what is launched after it finds its tokens in the cache."""
        for row in step.rows:
            request = row.request
            request.num_computed = row.end
            if row.known:
                self.tables.computed(request, row.start, row.end)
            request.num_ahead += row.samples

    def commit(self, step: Step) -> None:
        """The step's forward is done, and the tokens that it began with are known."""
        for row in step.rows:
            if not row.known and row.request.status is Status.RUNNING:  # else it has lost its blocks since
                self.tables.computed(row.request, row.start, row.end)
            for group in self._apart if row.samples else ():
                group.discard(row.request)

    @property
    def serves_apart(self) -> bool:
        """Whether only some requests are served for the time being; see `serve_apart`."""
        self._drop_served()
        return bool(self._apart)

    def serve_apart(self, *groups: Sequence[Request]) -> None:
        """Until each of these requests is up to date once, serve only those of one group at a time, these first."""
        self._apart = [set(group) for group in groups] + self._apart

    def _drop_served(self) -> None:
        while self._apart and all(request.finished or request.held for request in self._apart[0]):
            self._apart.pop(0)

    def _budget(self, active: Sequence[Request]) -> int:
        """Most tokens of the next step, in which these running requests may be served."""
        if self.pace is None:
            return self.max_num_batched_tokens
        pending = [request.num_pending for request in active]
        decode, room = pending.count(1), self.max_num_seqs - len(pending)
        prompts = sum(pending) - decode
        prompts += sum(r.num_pending for r in itertools.islice(filter(self._ready, self.waiting), max(0, room)))
        return min(self.max_num_batched_tokens, decode + (self.pace(decode, prompts) if prompts else 0))

    def _continue_running(
        self, shares: dict[Request, Scheduled], step: Step, active: Sequence[Request], budget: int
    ) -> None:
        for request in sorted(active, key=lambda r: r.num_pending > 1):  # stable: decode rows first, each in order
            if budget <= 0 or len(shares) >= self.max_num_seqs:
                return
            if request.status is not Status.RUNNING:
                continue  # preempted for one before it
            share = Scheduled(request, request.num_computed, min(request.num_pending, budget))
            budget += self._extend(share, shares, step)
            if request.status is Status.RUNNING:
                shares[request] = share
                budget -= share.count

    def _extend(self, share: Scheduled, shares: dict[Request, Scheduled], step: Step) -> int:
        """Get blocks for a running request, from the last in the order if need be, which may be itself.

        Returns:
            How many tokens of the step were lost with the requests preempted for it.
        """
        lost = 0
        while not self.tables.extend(share.request, share.end):
            victim = self.running[-1]
            if victim in shares:
                lost += shares.pop(victim).count
            self._preempt(victim)
            step.preempted.append(victim)
            if victim is share.request:
                break
        return lost

    def _admit_waiting(self, shares: dict[Request, Scheduled], budget: int) -> None:
        budget -= sum(share.count for share in shares.values())
        active = sum(map(self._active, self.running))
        for request in list(itertools.islice(filter(self._ready, self.waiting), max(0, self.max_num_seqs - active))):
            if budget <= 0 or len(shares) >= self.max_num_seqs:
                return
            count = self.tables.admit(request, budget, self._expected(request))
            if count is None:
                return  # those behind it must not overtake it for ever
            self.waiting.remove(request)
            request.status = Status.RUNNING
            bisect.insort(self.running, request, key=self.key)
            shares[request] = Scheduled(request, request.num_computed, count)
            budget -= count

    def _make_room(self, step: Step) -> bool:
        """Nothing could be served: requests that may not be served now hold the blocks. Take the last one's."""
        victim = next((r for r in reversed(self.running) if not self._active(r)), None)
        if victim is None or not any(self._ready(r) for r in self.waiting):
            return False
        self._preempt(victim)
        step.preempted.append(victim)
        return True

    def _preempt(self, request: Request) -> None:
        self.tables.release(request)
        self.running.remove(request)
        request.status = Status.WAITING
        request.metrics.num_preemptions += 1
        self.num_preemptions += 1
        bisect.insort(self.waiting, request, key=self.key)

    def _active(self, request: Request) -> bool:
        """Whether a running request may be served: it doesn't wait for its caller, and no others are served apart."""
        if request.held or (self._apart and request not in self._apart[0]):
            return False
        # Of the token that only the device knows, it is known whether it is the last by length.
        return not request.num_ahead or (request.runs_ahead and request.num_tokens < request.limit)

    def _ready(self, request: Request) -> bool:
        """Whether a waiting request may be admitted: it doesn't wait for its caller, nor for its parent's prompt."""
        if request.num_ahead:  # it lost its blocks after a step was launched that is still under way
            return False
        parent = request.parent
        if parent is None or parent.status is Status.FINISHED or parent.order < 0 or self._apart:
            return self._active(request)
        # A preempted parent that has begun its output, or waits for its caller, would only hold its children up.
        due = parent.num_computed < len(parent.prompt_token_ids) and parent.num_output == 0 and not parent.held
        return self._active(request) and not due

    def _expected(self, request: Request) -> int:
        most = request.params.max_tokens
        expected = len(request.prompt_token_ids) + most if most else 2 * len(request.token_ids)
        expected = max(expected, len(request.token_ids))
        return min(expected, self.max_model_len) if self.max_model_len else expected

    def check(self) -> None:
        """Verify the books: queues, statuses and blocks.

        Raises:
            AssertionError: they don't match; a bug in hf_paged.
        """
        assert all(r.status is Status.RUNNING and r.tables for r in self.running)
        assert all(r.status is Status.WAITING and not r.tables for r in self.waiting)
        for queue in (self.running, self.waiting):
            assert queue == sorted(queue, key=self.key)
        self.tables.check(self.running)


class PriorityScheduler(FCFSScheduler):
    """The smallest `Request.priority` first, until a request has waited long enough: see `turn`."""

    def key(self, request: Request) -> tuple[int, ...]:
        return (turn(request.metrics.arrival_time, request.priority), request.order)


def turn(arrival: float, priority: int) -> int:
    """What requests with priorities are ordered by, smallest first: their arrival, a minute later for each level.

    A request is overtaken only by those that come within a minute for each level between them, so it waits for a
    bounded time however many of a smaller priority follow. The value doesn't change while a request waits: a sorted
    queue stays sorted. Requests of one arrival are in the order of their priorities, those of one priority first come,
    first served.

    Args:
        arrival: in seconds of `time.monotonic()`.
        priority: any integer; the sum is exact.

    Returns:
        Nanoseconds on the clock of `arrival`.
    """
    return round(arrival * 1e9) + LEVEL * priority
