"""The block pool: counts, order of eviction, keys, claims."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import hf_paged
from hf_paged.engine.blocks import BlockPool


class NaivePool:
    """What a block pool must do, without any order: a list of reference counts and a dict of keys."""

    def __init__(self, num_blocks):
        self.refs = [0] * num_blocks
        self.keys = {}

    @property
    def free(self):
        return [block for block in range(1, len(self.refs)) if not self.refs[block]]

    def grow(self, num_blocks):
        self.refs += [0] * (num_blocks - len(self.refs))

    def take(self, block):
        assert block in self.free
        self.refs[block] = 1
        self.keys.pop(block, None)

    def share(self, block):
        self.refs[block] += 1

    def give(self, blocks):
        for block in blocks:
            self.refs[block] -= 1

    def set_key(self, block, key):
        if key not in self.keys.values():
            self.keys.setdefault(block, key)

    def find(self, key):
        return next((block for block, own in self.keys.items() if own == key), None)


@pytest.mark.parametrize("module", ["blocks", "tables", "scheduler"])
def test_no_torch(module):
    """The part of the engine that decides can be used and tested without torch."""
    tree = ast.parse((Path(hf_paged.__file__).parent / "engine" / f"{module}.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in imported if name.split(".")[0] == "torch"]
    below = {
        "hf_paged.protocols",
        "hf_paged.batch",
        "hf_paged.request",
        "hf_paged.engine.blocks",
        "hf_paged.engine.tables",
    }
    assert {name for name in imported if name.startswith("hf_paged")} <= below


def test_null_block_is_never_given():
    pool = BlockPool(4)
    assert sorted(pool.take() for _ in range(3)) == [1, 2, 3]
    with pytest.raises(IndexError):
        pool.take()
    pool.check()


def test_a_pool_needs_a_block():
    with pytest.raises(ValueError, match="num_blocks=1"):
        BlockPool(1)


def test_shared_block_is_free_when_all_let_go():
    pool = BlockPool(3)
    block = pool.take()
    pool.share(block)
    pool.give([block])
    assert pool.num_free == 1
    pool.give([block])
    assert pool.num_free == 2


def test_giving_twice_is_refused():
    pool = BlockPool(3)
    block = pool.take()
    pool.give([block])
    with pytest.raises(ValueError, match=f"block {block} is free already"):
        pool.give([block])


def test_giving_the_null_block_does_nothing():
    pool = BlockPool(3)
    pool.give([0, 0])
    pool.check()


def test_unhashed_blocks_are_given_up_before_cached_ones_and_those_oldest_first():
    pool = BlockPool(6)
    first, second, plain = pool.take(), pool.take(), pool.take()
    pool.set_key(first, b"first")
    pool.set_key(second, b"second")
    pool.give([second, plain, first])
    order = [pool.take() for _ in range(5)]
    assert order[0] == plain
    assert order[-2:] == [second, first]
    assert pool.find(b"first") is None


def test_the_cache_policy_decides_what_is_given_up_first():
    class KeepNothing:
        def keep(self, cached):
            return False

    pool = BlockPool(4, KeepNothing())
    block = pool.take()
    pool.set_key(block, b"key")
    pool.give([block])
    assert pool.take() == block


def test_a_free_block_found_by_its_key_is_used_again():
    pool = BlockPool(4)
    block = pool.take()
    pool.set_key(block, b"key")
    pool.give([block])
    assert pool.find(b"key") == block
    pool.share(block)
    assert pool.num_free == 2
    assert block not in [pool.take(), pool.take()]


def test_the_first_block_with_a_content_keeps_the_key():
    pool = BlockPool(4)
    one, other = pool.take(), pool.take()
    pool.set_key(one, b"key")
    pool.set_key(other, b"key")
    assert pool.find(b"key") == one
    assert pool.num_cached == 1


def test_forget_voids_keys_but_holds_blocks():
    pool = BlockPool(4)
    block = pool.take()
    pool.set_key(block, b"key")
    pool.forget()
    assert pool.find(b"key") is None
    assert pool.refs[block] == 1


def test_grown_blocks_are_given_before_cached_ones():
    pool = BlockPool(2)
    block = pool.take()
    pool.set_key(block, b"key")
    pool.give([block])
    pool.grow(4)
    assert sorted([pool.take(), pool.take()]) == [2, 3]
    assert pool.find(b"key") == block
    pool.check()


def test_take_prefers_the_block_after():
    pool = BlockPool(8)
    assert pool.take(after=4) == 5
    assert pool.take(after=4) != 5
    assert pool.take(after=7) in range(1, 8)


def test_claimed_blocks_are_taken_last_by_others():
    pool = BlockPool(6)
    claim = pool.claim(3)
    assert claim == range(1, 4)
    assert [pool.take() for _ in range(5)] == [4, 5, 1, 2, 3]


def test_claims_do_not_overlap_and_come_back():
    pool = BlockPool(8)
    first, second = pool.claim(3), pool.claim(3)
    assert not set(first) & set(second)
    assert not pool.claim(3)
    pool.unclaim(first)
    assert pool.claim(3) == first


def test_a_claim_that_follows_stops_at_what_is_used():
    pool = BlockPool(8)
    pool.take(after=4)
    assert pool.claim(4, start=3) == range(3, 5)
    assert pool.claim(4, start=5) == range(0)
    assert pool.claim(4, start=6) == range(6, 8)


@pytest.mark.parametrize("length", [0, -1, 100])
def test_claims_of_impossible_lengths_are_empty(length):
    pool = BlockPool(8)
    pool.take()
    assert not pool.claim(length)
