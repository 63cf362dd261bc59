"""The scheduler: who is served, with how many tokens, and who has to go. Without a model."""

from __future__ import annotations

import pytest
from engine.fake import make_request

from hf_paged.engine.scheduler import FCFSScheduler, PriorityScheduler
from hf_paged.engine.tables import BlockTables
from hf_paged.request import RequestMetrics


def make_scheduler(kind=FCFSScheduler, *, num_blocks=40, size=4, seqs=8, budget=10, windows=(None,), **options):
    tables = BlockTables(windows, [num_blocks] * len(windows), size, prefix_caching=False)
    return kind(tables, max_num_seqs=seqs, max_num_batched_tokens=budget, **options)


def add(scheduler, *lengths, **fields):
    requests = [make_request([index] * length, **fields) for index, length in enumerate(lengths)]
    for request in requests:
        scheduler.add(request)
    return requests


def step(scheduler):
    """One step whose forward gives every row that samples the token 0. The shares: (request, start, count)."""
    made = scheduler.schedule()
    scheduler.launched(made)
    scheduler.commit(made)
    for row in made.rows:
        if row.samples:
            row.request.num_ahead -= 1
            row.request.token_ids.append(0)
    scheduler.check()
    return [(row.request, row.start, row.count) for row in made.rows]


def test_nothing_to_do():
    scheduler = make_scheduler()
    assert not scheduler.has_work
    assert step(scheduler) == []


def test_prompts_are_cut_into_chunks_of_the_budget():
    scheduler = make_scheduler(budget=10)
    a, b = add(scheduler, 23, 4)
    assert step(scheduler) == [(a, 0, 10)]
    assert step(scheduler) == [(a, 10, 10)]
    assert step(scheduler) == [(a, 20, 3), (b, 0, 4)]
    assert step(scheduler) == [(a, 23, 1), (b, 4, 1)]


def test_prompts_are_paced_beside_answers_that_have_begun():
    scheduler = make_scheduler(budget=10)
    asked = []
    scheduler.pace = lambda decode, wanted: asked.append((decode, wanted)) or 3
    a, b = add(scheduler, 2, 8)
    assert step(scheduler) == [(a, 0, 2), (b, 0, 1)]
    assert step(scheduler) == [(a, 2, 1), (b, 1, 3)]
    (c,) = add(scheduler, 20)
    assert step(scheduler) == [(a, 3, 1), (b, 4, 3)]
    assert step(scheduler) == [(a, 4, 1), (b, 7, 1), (c, 0, 3)]
    assert asked == [(0, 10), (1, 7), (1, 24), (2, 20)]  # the last token of a prompt is a row of one


def test_rows_of_one_token_stay_under_the_budget_too():
    scheduler = make_scheduler(budget=10)
    scheduler.pace = lambda decode, wanted: wanted
    add(scheduler, *[1] * 8)
    assert len(step(scheduler)) == 8
    scheduler.max_num_batched_tokens = 3
    assert len(step(scheduler)) == 3


def test_answers_that_have_begun_come_before_prompts():
    scheduler = make_scheduler(budget=6)
    a, b = add(scheduler, 8, 3)
    step(scheduler)
    assert step(scheduler) == [(a, 6, 2), (b, 0, 3)]
    (c,) = add(scheduler, 20)
    assert step(scheduler) == [(a, 8, 1), (b, 3, 1), (c, 0, 4)]
    assert step(scheduler) == [(a, 9, 1), (b, 4, 1), (c, 4, 4)]


def test_no_more_rows_than_allowed():
    scheduler = make_scheduler(seqs=2)
    a, b, c = add(scheduler, 1, 1, 1)
    assert step(scheduler) == [(a, 0, 1), (b, 0, 1)]
    scheduler.remove(a)
    assert step(scheduler) == [(b, 1, 1), (c, 0, 1)]


def test_first_come_first_served_also_when_a_later_one_would_fit():
    scheduler = make_scheduler(num_blocks=5, budget=9)
    a, b, c = add(scheduler, 9, 9, 1)
    assert step(scheduler) == [(a, 0, 9)]
    assert step(scheduler) == [(a, 9, 1)]
    assert scheduler.waiting == [b, c]


def test_priority_orders_admission():
    scheduler = make_scheduler(PriorityScheduler, budget=4)
    low, high, same = [make_request([1] * 4, priority=p) for p in (5, 1, 5)]
    for request in (low, high, same):
        scheduler.add(request)
    assert step(scheduler) == [(high, 0, 4)]
    assert scheduler.waiting == [low, same]


def arriving(second, priority, length=4):
    """A request that comes at a point in time."""
    return make_request([1] * length, priority=priority, metrics=RequestMetrics(arrival_time=1e6 + second))


def test_a_low_priority_is_served_though_high_ones_keep_coming():
    """One row at a time, and each ten seconds another request of a high priority, which takes ten seconds."""
    scheduler = make_scheduler(PriorityScheduler, seqs=1)
    low = arriving(0, 3)
    scheduler.add(low)
    for second in range(0, 1000, 10):
        scheduler.add(arriving(second, 0))
        ((served, _, _),) = step(scheduler)
        scheduler.remove(served)
        if served is low:
            break
    assert second == 180  # three levels, a minute each


def test_requests_of_one_moment_are_in_the_order_of_their_priorities():
    scheduler = make_scheduler(PriorityScheduler)
    requests = [arriving(0, priority) for priority in (200, 1, 10**400, 0, -(2**70), 1, 0, -(10**400))]
    for request in requests:
        scheduler.add(request)
    assert [request.priority for request in scheduler.waiting] == sorted(request.priority for request in requests)
    assert scheduler.waiting == sorted(requests, key=lambda request: (request.priority, request.order))


def test_equal_priorities_are_first_come_first_served():
    scheduler = make_scheduler(PriorityScheduler)
    later, sooner = arriving(1e-6, 7), arriving(0, 7)
    for request in (later, sooner):
        scheduler.add(request)
    assert scheduler.waiting == [sooner, later]


def test_out_of_blocks_the_last_in_the_order_goes():
    scheduler = make_scheduler(num_blocks=5, budget=20)
    a, b = add(scheduler, 8, 7)
    assert step(scheduler) == [(a, 0, 8), (b, 0, 7)]
    made = scheduler.schedule()
    assert [row.request for row in made.rows] == [a]
    assert made.preempted == [b]
    scheduler.launched(made)
    scheduler.commit(made)
    a.num_ahead -= 1
    a.token_ids.append(0)
    assert (b.num_computed, b.tables, b.metrics.num_preemptions) == (0, [], 1)
    assert scheduler.num_preemptions == 1
    scheduler.remove(a)
    assert step(scheduler) == [(b, 0, 8)]  # its output token too


def test_priority_decides_who_goes():
    scheduler = make_scheduler(PriorityScheduler, num_blocks=5, budget=20)
    low, high = make_request([1] * 7, priority=1), make_request([2] * 8, priority=0)
    scheduler.add(low)
    scheduler.add(high)
    step(scheduler)
    assert scheduler.running == [high, low]
    assert step(scheduler) == [(high, 8, 1)]
    assert scheduler.waiting == [low]


@pytest.mark.parametrize(("second", "first"), [(59, False), (61, True)])
def test_a_low_priority_that_came_long_before_keeps_its_blocks(second, first):
    scheduler = make_scheduler(PriorityScheduler, num_blocks=5, budget=20)
    low, high = arriving(0, 1, 8), arriving(second, 0, 8)
    scheduler.add(high)
    scheduler.add(low)
    step(scheduler)
    made = scheduler.schedule()
    assert made.preempted == [high if first else low]
    assert [row.request for row in made.rows] == [low if first else high]


def test_the_tokens_of_a_preempted_share_go_to_others():
    scheduler = make_scheduler(num_blocks=6, budget=6, size=2)
    a, b, c = add(scheduler, 2, 2, 2)
    step(scheduler)
    step(scheduler)
    assert sum(count for _, _, count in step(scheduler)) <= 6
    assert not {a, b, c} - {*scheduler.running, *scheduler.waiting}


def test_a_held_request_is_not_served_but_keeps_its_blocks():
    scheduler = make_scheduler()
    a, b = add(scheduler, 4, 4)
    step(scheduler)
    a.held = True
    assert step(scheduler) == [(b, 4, 1)]
    b.held = True
    assert not scheduler.has_work
    assert a.tables
    a.held = False
    assert step(scheduler) == [(a, 4, 1)]


@pytest.mark.parametrize("first", [True, False])
def test_held_requests_make_room_when_nothing_else_could_go_on(first):
    scheduler = make_scheduler(num_blocks=4, budget=20)
    held, other = add(scheduler, 8, 8) if first else reversed(add(scheduler, 8, 8))
    step(scheduler)
    step(scheduler)
    if not first:
        scheduler.remove(held)
        scheduler.add(held)
        step(scheduler)
    for request in (held, other):
        request.held = request is held
    served = [request for _ in range(3) for request, _, _ in step(scheduler)]
    assert other in served


def test_children_wait_for_their_parents_prompt():
    scheduler = make_scheduler(budget=6)
    parent = make_request([1] * 9)
    child = make_request([1] * 9, parent=parent)
    scheduler.add(parent)
    scheduler.add(child)
    assert step(scheduler) == [(parent, 0, 6)]
    assert step(scheduler) == [(parent, 6, 3)]
    assert step(scheduler) == [(parent, 9, 1), (child, 8, 1)]


@pytest.mark.parametrize("fate", ["finished", "held and preempted", "never added"])
def test_children_do_not_wait_for_what_will_not_come(fate):
    scheduler = make_scheduler()
    parent = make_request([1] * 9)
    child = make_request([1] * 9, parent=parent)
    if fate != "never added":
        scheduler.add(parent)
        step(scheduler)
        parent.token_ids.pop()  # handed out, not answered
        parent.held = True
        scheduler._preempt(parent)
    if fate == "finished":
        scheduler.remove(parent)
    scheduler.add(child)
    assert scheduler.has_work
    assert step(scheduler) == [(child, 0, 9)]


def test_served_apart_until_up_to_date():
    """Those that failed together are tried in groups, each to the point where it failed."""
    scheduler = make_scheduler(budget=4)
    a, b, c = add(scheduler, 6, 3, 2)
    scheduler.serve_apart([a], [b, c])
    assert step(scheduler) == [(a, 0, 4)]
    assert step(scheduler) == [(a, 4, 2)]
    assert step(scheduler) == [(b, 0, 3), (c, 0, 1)]
    assert step(scheduler) == [(c, 1, 1)]
    assert [request for request, _, _ in step(scheduler)] == [a, b, c]


def test_groups_served_apart_make_room_for_each_other():
    scheduler = make_scheduler(num_blocks=4, budget=20)
    a, b = add(scheduler, 8, 8)
    scheduler.serve_apart([a], [b])
    assert step(scheduler) == [(a, 0, 8)]
    assert step(scheduler) == [(b, 0, 8)]
    assert a in scheduler.waiting


def test_a_group_whose_requests_are_gone_holds_nobody_up():
    scheduler = make_scheduler()
    a, b = add(scheduler, 2, 2)
    scheduler.serve_apart([a], [b])
    scheduler.remove(a)
    assert step(scheduler) == [(b, 0, 2)]


def test_restart():
    scheduler = make_scheduler()
    a, b = add(scheduler, 4, 4)
    step(scheduler)
    scheduler.running.remove(a)  # broken off on its way from one queue to the other
    scheduler.restart([b, a])
    scheduler.check()
    assert scheduler.waiting == [a, b]
    assert step(scheduler) == [(a, 0, 5), (b, 0, 5)]


def test_check_finds_a_lost_block():
    scheduler = make_scheduler()
    (a,) = add(scheduler, 4)
    step(scheduler)
    a.tables[0].pop()
    with pytest.raises(AssertionError, match="differ"):
        scheduler.check()
