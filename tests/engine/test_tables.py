"""Block tables: prefixes, forks, copies on write, windows, runs. Without a model."""

from __future__ import annotations

import itertools

import pytest
from engine.fake import make_request

from hf_paged.engine.tables import BlockTables


def make_tables(windows=(None,), num_blocks=20, size=4, **options):
    return BlockTables(windows, [num_blocks] * len(windows), size, **options)


def compute(tables, request, count=None):
    """Admit or extend a request, as far as `count` tokens or all, and take them for computed."""
    if not request.tables:
        assert tables.admit(request, count or len(request.token_ids), len(request.token_ids)) is not None
    end = len(request.token_ids) if count is None else min(count, len(request.token_ids))
    assert tables.extend(request, end)
    start, request.num_computed = request.num_computed, end
    tables.computed(request, start, request.num_computed)
    return request


def computed(tables, prompt, **fields):
    return compute(tables, make_request(prompt, **fields))


def grow(tables, request, count, step=1):
    """Append output tokens and compute them, `step` at a time."""
    for _ in range(0, count, step):
        request.token_ids += [0] * step
        compute(tables, request)


def num_used(tables):
    return [pool.num_blocks - 1 - pool.num_free for pool in tables.pools]


# ----------------------------------------------------------------------------------------------------------- take, give


def test_as_many_blocks_as_tokens_need():
    tables = make_tables()
    request = computed(tables, range(9))
    assert len(request.tables[0]) == 3
    grow(tables, request, 3)
    assert len(request.tables[0]) == 3
    grow(tables, request, 1)
    assert len(request.tables[0]) == 4
    tables.release(request)
    assert request.tables == []
    assert request.num_computed == 0
    assert num_used(tables) == [0]


def test_admission_is_all_or_nothing():
    tables = make_tables(num_blocks=4)
    first, second = computed(tables, range(8)), make_request([5] * 8)
    assert tables.admit(second, 8, 8) is None
    assert second.tables == []
    assert second.num_computed == 0
    assert num_used(tables) == [2]
    tables.check([first])


def test_extending_is_all_or_nothing_over_all_groups():
    tables = BlockTables([None, 4], [8, 3], 4)
    request = computed(tables, range(4))
    request.token_ids += range(20)
    assert not tables.extend(request, 20)
    assert num_used(tables) == [1, 1]
    tables.check([request])


def test_a_waiting_request_has_nothing_to_give():
    tables = make_tables()
    tables.release(make_request([1, 2]))
    tables.check([])


def test_waste_is_counted_when_blocks_come_back():
    tables = make_tables()
    tables.release(computed(tables, range(9)))
    assert (tables.reserved_tokens, tables.used_tokens) == (12, 9)


# ------------------------------------------------------------------------------------------------------------- prefixes


@pytest.mark.parametrize(("length", "cached"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (13, 8)])
def test_whole_blocks_are_found_and_one_token_is_left(length, cached):
    tables = make_tables()
    tables.release(computed(tables, range(11)))
    request = make_request(range(length))
    assert tables.admit(request, 100, length) == length - cached
    assert request.num_computed == request.num_cached == cached
    assert (tables.prefix_queries, tables.prefix_hits) == (11 + length, cached)


def test_a_block_counts_only_with_all_before_it():
    tables = make_tables()
    tables.release(computed(tables, range(12)))
    request = computed(tables, [9, *range(1, 12)])
    assert request.num_cached == 0
    same_middle = computed(tables, [0, 1, 2, 3, 4, 5, 6, 99, 8, 9, 10, 11])
    assert same_middle.num_cached == 4


def test_blocks_are_shared_while_both_run():
    tables = make_tables()
    first, second = computed(tables, range(10)), computed(tables, range(10))
    assert first.tables[0][:2] == second.tables[0][:2]
    assert first.tables[0][2] != second.tables[0][2]
    assert num_used(tables) == [4]
    assert tables.take_copies() == [[]]  # nobody writes to a full block
    tables.check([first, second])


def test_outputs_are_found_too():
    tables = make_tables()
    first = computed(tables, range(6))
    grow(tables, first, 7)
    second = computed(tables, first.token_ids)
    assert second.num_cached == 12


def test_keys_keep_apart_what_must_not_be_shared():
    tables = make_tables()
    tables.release(computed(tables, range(9), cache_key="adapter"))
    assert computed(tables, range(9)).num_cached == 0
    assert computed(tables, range(9), cache_key="adapter").num_cached == 8


def test_prefix_caching_can_be_off():
    tables = make_tables(prefix_caching=False)
    tables.release(computed(tables, range(9)))
    assert computed(tables, range(9)).num_cached == 0
    assert tables.pools[0].num_cached == 0


def test_prompt_logprobs_need_every_token_computed():
    tables = make_tables()
    tables.release(computed(tables, range(9)))
    assert computed(tables, range(9), params={"prompt_logprobs": 1}).num_cached == 0


def test_forgetting():
    tables = make_tables()
    tables.release(computed(tables, range(9)))
    tables.forget()
    assert computed(tables, range(9)).num_cached == 0


def test_what_rests_on_forgotten_blocks_is_not_found():
    """A request that runs while the weights change goes on over its old keys: its new blocks are its own."""
    tables = make_tables()
    old = computed(tables, range(6))
    tables.forget()
    grow(tables, old, 6)
    assert tables.pools[0].num_cached == 0
    new = computed(tables, old.token_ids)
    assert new.num_cached == 0
    assert computed(tables, [*old.token_ids, 7]).num_cached == 12  # the new one's
    tables.release(old)
    again = computed(tables, old.token_ids)
    assert again.num_cached == 8


def test_a_prefix_outlives_its_request_until_its_blocks_are_needed():
    tables = make_tables(num_blocks=7)
    tables.release(computed(tables, range(9)))
    computed(tables, [7] * 9)
    tables.release(found := computed(tables, range(9)))
    assert found.num_cached == 8
    tables.release(computed(tables, [8] * 12))
    assert computed(tables, range(5)).num_cached == 0


def test_the_end_of_a_prompt_is_evicted_before_its_beginning():
    tables = make_tables(num_blocks=6)
    tables.release(computed(tables, range(17)))
    tables.release(computed(tables, [7] * 9))  # takes the unhashed block and two more
    assert computed(tables, range(17)).num_cached == 8


# ---------------------------------------------------------------------------------------------------------------- forks


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_child_shares_the_prompt_and_copies_its_last_block(length, prefix_caching):
    tables = make_tables(prefix_caching=prefix_caching)
    parent = computed(tables, range(length))
    child = make_request(range(length), parent=parent)
    assert tables.admit(child, 100, length) == 1
    assert child.num_cached == length - 1
    blocks = -(-length // 4)
    assert child.tables[0][: blocks - 1] == parent.tables[0][: blocks - 1]
    assert child.tables[0][-1] != parent.tables[0][-1]
    assert tables.take_copies() == [[(parent.tables[0][-1], child.tables[0][-1])]]
    assert num_used(tables) == [blocks + 1]
    tables.check([parent, child])


def test_a_parent_that_moved_on_is_forked_at_its_prompt():
    tables = make_tables(prefix_caching=False)
    parent = computed(tables, range(6))
    grow(tables, parent, 9)
    child = computed(tables, range(6), parent=parent)
    assert child.num_cached == 5
    assert child.tables[0][0] == parent.tables[0][0]
    assert len(child.tables[0]) == 2
    assert len(tables.take_copies()[0]) == 1


def test_a_parent_whose_window_moved_on_is_not_forked():
    """Its window's blocks are gone, and the null block must not be read in their place."""
    tables = make_tables(windows=(None, 4), prefix_caching=False)
    parent = computed(tables, range(10))
    grow(tables, parent, 12)
    child = computed(tables, range(10), parent=parent)
    assert child.num_cached == 0
    tables.check([parent, child])


def test_a_fork_gives_up_what_its_own_window_does_not_see():
    tables = make_tables(windows=(4,), prefix_caching=False)
    parent = computed(tables, range(14))
    child = computed(tables, range(14), parent=parent)
    assert child.num_cached == 13
    assert child.tables[0][0] == 0
    tables.check([parent, child])


def test_a_cached_prefix_longer_than_the_prompt_beats_the_parent():
    """A child that was preempted finds its own output again."""
    tables = make_tables()
    parent = computed(tables, range(5))
    child = computed(tables, range(5), parent=parent)
    grow(tables, child, 8)
    tables.release(child)
    compute(tables, child)
    assert tables.prefix_hits == 4
    assert child.tables[0][:3] != parent.tables[0][:3]


def test_a_copy_is_forgotten_with_the_block_it_was_for():
    """The block may be handed to another in the same step, and must not be spoilt by the copy."""
    tables = make_tables(prefix_caching=False)
    parent = computed(tables, range(6))
    child = make_request(range(6), parent=parent)
    tables.admit(child, 100, 6)
    tables.release(child)
    assert tables.take_copies() == [[]]


def test_two_children_of_one_step_copy_from_the_parent():
    tables = make_tables(prefix_caching=False)
    parent = computed(tables, range(6))
    children = [make_request(range(6), parent=parent) for _ in range(2)]
    for child in children:
        tables.admit(child, 100, 6)
    last = parent.tables[0][-1]
    assert tables.take_copies() == [[(last, child.tables[0][-1]) for child in children]]


# -------------------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("window", [1, 3, 4, 5, 9])
def test_what_falls_out_of_the_window_is_given_up(window):
    tables = make_tables(windows=(window,))
    request = computed(tables, [1])
    for _ in range(40):
        grow(tables, request, 1)
        # Given up at the next step but one: a fork may still ask for what the last query saw.
        first = max(0, request.num_computed - 2 - window + 1) // 4
        table = request.tables[0]
        assert all(block == 0 for block in table[:first])
        assert all(block != 0 for block in table[first:])
        assert num_used(tables)[0] <= tables.most_blocks(0, request.num_computed, 1)


@pytest.mark.parametrize("chunk", [1, 3, 8])
@pytest.mark.parametrize("window", [1, 4, 6])
def test_most_blocks_is_never_exceeded(window, chunk):
    tables = make_tables(windows=(window,), num_blocks=60, size=4)
    request = make_request([*range(1, 60)])
    for end in range(chunk, 60, chunk):
        compute(tables, request, end)
        assert num_used(tables)[0] <= tables.most_blocks(0, 59, chunk)


def test_a_prefix_hit_needs_the_window_alone():
    tables = make_tables(windows=(4,))
    tables.release(computed(tables, range(13)))
    request = computed(tables, range(13))
    assert request.num_cached == 12
    assert request.tables[0][:2] == [0, 0]
    assert num_used(tables) == [2]


def test_the_longest_prefix_all_groups_still_have():
    tables = make_tables(windows=(None, 5), num_blocks=12)
    first = computed(tables, range(21))
    tables.release(first)
    window = tables.pools[1]
    window.take(after=window.find(first.block_keys[4]) - 1)  # the last block, which all longer prefixes need
    request = make_request(range(21))
    tables.admit(request, 100, 21)
    assert request.num_cached == 16


# ----------------------------------------------------------------------------------------------------------------- runs


def in_a_row(table):
    return all(b == a + 1 for a, b in itertools.pairwise(table))


def test_requests_that_grow_side_by_side_keep_their_blocks_in_a_row():
    tables = make_tables(num_blocks=60, prefer_runs=True)
    requests = [make_request([index] * 5) for index in range(4)]
    for request in requests:
        tables.admit(request, 5, 40)
        compute(tables, request)
    for _ in range(35):
        for request in requests:
            grow(tables, request, 1)
    assert all(in_a_row(request.tables[0]) for request in requests)
    assert all(len(request.tables[0]) == 10 for request in requests)
    tables.check(requests)


def test_runs_are_a_wish_and_not_a_need():
    tables = make_tables(num_blocks=10, prefer_runs=True)
    requests = [make_request([index] * 5) for index in range(3)]
    for request in requests:
        tables.admit(request, 5, 30)
        compute(tables, request)
    for _ in range(7):
        for request in requests:
            grow(tables, request, 1)
    assert num_used(tables) == [9]
    tables.check(requests)


def test_claims_end_with_their_request():
    tables = make_tables(num_blocks=12, prefer_runs=True)
    for index in range(20):
        request = make_request([index] * 3)
        tables.admit(request, 3, 40)
        compute(tables, request)
        grow(tables, request, 30)
        assert in_a_row(request.tables[0])
        tables.release(request)
    assert not any(tables.pools[0].is_claimed(block) for block in range(12))


# ----------------------------------------------------------------------------------------------------------------- cost


def test_a_waiting_prompt_is_hashed_once(monkeypatch):
    """A request that waits for blocks, step after step, must not cost a hash of its prompt each time."""
    tables = make_tables(num_blocks=6)
    computed(tables, [7] * 12)
    waiting = make_request(range(17))
    assert tables.admit(waiting, 100, 17) is None
    monkeypatch.setattr("hf_paged.engine.tables.hashlib.blake2b", None)
    assert tables.admit(waiting, 100, 17) is None
