"""Random operations on tiny pools: whatever happens, the books match, nobody starves, no token is lost or doubled."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from engine import fake
from engine.test_blocks import NaivePool

from hf_paged.engine.blocks import BlockPool
from hf_paged.engine.scheduler import FCFSScheduler, PriorityScheduler

WORLDS, OPERATIONS = 40, 300
POISON = fake.VOCAB - 1


class World:
    """An engine, the requests that it was given, and what they must come to."""

    def __init__(self, seed):
        pick = self.pick = random.Random(seed)
        self.windows = pick.choice([fake.FULL, fake.WINDOW, fake.BOTH])
        self.size = pick.choice([2, 4])
        self.budget = pick.choice([3, 7, 16])
        self.engine = fake.make_engine(
            self.windows,
            prefer_runs=pick.random() < 0.5,
            block_size=self.size,
            num_blocks=pick.randint(40, 56) // self.size,
            max_num_batched_tokens=self.budget,
            max_num_seqs=pick.choice([2, 5, 16]),
            enable_prefix_caching=pick.random() < 0.8,
            engine={
                "scheduler": pick.choice([FCFSScheduler, PriorityScheduler]),
                "run_ahead": pick.random() < 0.5,
            },
        )
        self.engine.model.poison = POISON
        self.engine.model.before = self.before_forward
        self.fault = None  # what the next forward raises
        self.breaks = 0  # callbacks to go until one raises; 0: none does
        self.hold = fake.Hold()
        self.live, self.done = [], []
        self.told = Counter()
        self.aborted, self.excused = set(), set()
        self.oldest, self.patience = None, 0
        self.counts = Counter()

    # ------------------------------------------------------------------------------------------------------- operations

    def add(self):
        pick = self.pick
        parents = [r for r in self.live if r.prompt_token_ids[0] != POISON]
        parent = pick.choice(parents) if parents and pick.random() < 0.25 else None
        prompt = parent.prompt_token_ids if parent else self.prompt()
        request = fake.make_request(
            prompt,
            pick.randint(1, 12),
            params={"temperature": 0.9, "seed": pick.randint(0, 9)} if pick.random() < 0.2 else None,
            priority=pick.randint(0, 2),
            parent=parent,
            sampler=self.hold if pick.random() < 0.15 else None,
            on_token=self.on_token,
        )
        self.engine.add(request)
        self.live.append(request)

    def prompt(self):
        """Few tokens and few beginnings, so that prompts share prefixes; now and then one that can't be computed."""
        pick = self.pick
        if pick.random() < 0.03:
            return [*[pick.randint(0, 2) for _ in range(pick.randint(0, 9))], POISON]
        head = [1, 2, 3, 1, 2, 3, 1, 1, 2, 2, 3, 3][: pick.randint(0, 12)]
        return [*head, *[pick.randint(0, 2) for _ in range(pick.randint(1, 10))]]

    def step(self):
        before = [(r, len(r.token_ids)) for r in self.live]
        failing = self.fault is not None or self.breaks
        self.engine.step()
        for request, length in before:
            assert len(request.token_ids) - length in (0, 1)
        self.watch_oldest(failing)

    def abort(self):
        if self.live:
            request = self.pick.choice(self.live)
            self.aborted.add(request)
            self.engine.abort(request)

    def push(self):
        held = [r for r in self.live if r.held]
        if held:
            request = self.pick.choice(held)
            self.engine.push(request, int(self.hold.logits[request].argmax()))

    def restart(self):
        self.engine.restart()
        self.oldest = None

    def forget(self):
        self.engine.forget()

    def fail_once(self):
        self.fault = RuntimeError("once")
        self.step()

    def fail_callback(self):
        self.breaks = self.pick.randint(1, 3)
        self.step()

    def new_weights(self):
        """While nobody runs: what is running belongs to the old ones."""
        if not self.live:
            self.engine.model.salt += 1
            self.engine.refresh()

    # ------------------------------------------------------------------------------------------------------- happenings

    def before_forward(self, batch):
        fault, self.fault = self.fault, None
        if fault is not None:
            if len(batch.rows) == 1:
                self.excused.add(batch.rows[0].request)
            raise fault

    def on_token(self, request):
        self.told[request] += 1
        if self.breaks and not request.finished:
            self.breaks -= 1
            if not self.breaks:
                self.excused.add(request)
                raise RuntimeError("a callback")

    # ----------------------------------------------------------------------------------------------------------- checks

    def watch_oldest(self, failing):
        """The first in the order that doesn't wait for its caller is done in a bounded number of steps."""
        key = self.engine.scheduler.key
        waiting = [r for r in self.live if not r.finished and not r.held]
        oldest = min(waiting, key=key, default=None)
        if oldest is None or oldest is not self.oldest or failing:
            self.oldest, self.patience = oldest, 150
        self.patience -= 1
        assert self.patience > 0, f"{oldest} starves"

    def check(self):
        self.engine.scheduler.check()
        for request in [r for r in self.live if r.finished]:
            self.live.remove(request)
            self.done.append(request)
            self.check_answer(request)
        assert set(self.live) == {*self.engine.scheduler.running, *self.engine.scheduler.waiting}

    def check_answer(self, request):
        prompt, output = request.prompt_token_ids, request.output_token_ids
        right = self.answer(request)
        assert output == right[: len(output)]
        self.counts[request.finish_reason] += 1
        self.counts["preempted"] += request.metrics.num_preemptions
        if request in self.aborted:
            assert request.finish_reason == "abort"
        elif POISON in prompt or request in self.excused or POISON in right[:-1]:
            assert request.finish_reason == "error"
        else:
            assert request.error is None
            assert output == right
            assert self.told[request] == len(
                output
            )  # once for each token, the last call being the one that finishes it
        if request.finish_reason in ("abort", "error"):
            assert self.told[request] == len(output) + 1

    def answer(self, request):
        prompt, params = request.prompt_token_ids, request.params
        salt = self.engine.model.salt
        if params.greedy or request.sampler is not None:
            return fake.expected(prompt, params.max_tokens, self.windows, salt=salt)
        alone = fake.make_engine(self.windows)
        alone.model.salt = salt
        again = fake.make_request(prompt, params=params.__dict__ | {"max_tokens": params.max_tokens})
        return fake.finish(alone, again)[0]


@pytest.mark.parametrize("seed", range(WORLDS))
def test_random_operations(seed):
    world = World(seed)
    operations = {
        world.step: 60,
        world.add: 20,
        world.push: 10,
        world.abort: 4,
        world.forget: 1,
        world.restart: 1,
        world.fail_once: 2,
        world.fail_callback: 2,
        world.new_weights: 2,
    }
    for _ in range(OPERATIONS):
        if len(world.live) >= 12:
            world.step()
            world.check()
        operation = world.pick.choices(list(operations), operations.values())[0]
        operation()
        world.check()
    while world.live:
        world.push()
        world.step()
        world.check()
    fake.assert_empty(world.engine)
    assert world.counts["length"] > 10


@pytest.mark.parametrize("seed", range(10))
def test_pool_against_a_naive_model(seed):
    """Blocks in use, found by key and free are those of a model that keeps a plain list of everything."""
    pick = random.Random(seed)
    pool, naive = BlockPool(pick.randint(3, 12)), None
    naive = NaivePool(pool.num_blocks)
    held = []  # one entry for each reference
    claims = []
    for number in range(600):
        action = pick.choice(
            ["take", "take", "give", "give", "share", "key", "find", "claim", "unclaim", "forget", "grow"]
        )
        if action == "take":
            after = pick.choice([None, pick.randrange(pool.num_blocks)])
            if not naive.free:
                with pytest.raises(IndexError):
                    pool.take(after)
                continue
            block = pool.take(after)
            if after is not None and after + 1 in naive.free:
                assert block == after + 1
            naive.take(block)
            held.append(block)
        elif action == "give" and held:
            given = pick.sample(held, pick.randint(1, len(held)))
            for block in given:
                held.remove(block)
            naive.give(given)
            pool.give(given)
        elif action == "share":
            sharable = sorted({*held, *naive.keys})
            if sharable:
                block = pick.choice(sharable)
                pool.share(block)
                naive.share(block)
                held.append(block)
        elif action == "key" and held:
            block, key = pick.choice(held), bytes([pick.randrange(8)])
            pool.set_key(block, key)
            naive.set_key(block, key)
        elif action == "find":
            key = bytes([pick.randrange(8)])
            assert pool.find(key) == naive.find(key)
        elif action == "claim":
            claims.append(pool.claim(pick.randint(0, 5), pick.choice([None, pick.randrange(1, pool.num_blocks)])))
            assert all(block in naive.free for block in claims[-1])
            # A claim only steers, so others may take its blocks; but no block is in two claims.
            assert max(Counter(block for claim in claims for block in claim).values(), default=1) == 1
        elif action == "unclaim" and claims:
            pool.unclaim(claims.pop(pick.randrange(len(claims))))
        elif action == "forget" and pick.random() < 0.1:
            pool.forget()
            naive.keys.clear()
        elif action == "grow" and number % 50 == 0 and pool.num_blocks < 40:
            pool.grow(pool.num_blocks + 3)
            naive.grow(pool.num_blocks)
        pool.check()
        assert pool.refs == naive.refs
        assert pool.num_free == len(naive.free)
        assert pool.num_cached == len(naive.keys)
    pool.give(held)
    pool.check()
    assert pool.num_free == pool.num_blocks - 1
