"""A model and a backend whose next token tells whether the engine kept its books.

Each layer writes (token, position) of every token to the cache and reads back, through the block tables, all that
its query sees. What it reads is hashed in order, and the hash decides the next token. A wrong table, a lost
copy-on-write, a stale prefix or a window cut at the wrong place gives another token; `expected` computes the right ones
without a cache.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch

from hf_paged.batch import CacheSpec, LayerSpec, Layout
from hf_paged.config import PagedConfig
from hf_paged.engine.batch import leading_decode_rows, wants_prompt_logprobs
from hf_paged.engine.engine import Engine
from hf_paged.engine.runner import Runner
from hf_paged.params import SamplingParams
from hf_paged.request import Request, Sampled

VOCAB = 97
BASE, MIX = 1_000_003, 7_919  # hashes are taken modulo 2**64, as int64 wraps round

FULL = (None, None)
WINDOW = (5,)
BOTH = (None, 6, None, 9)

# Whether engines launch a step before the one before it has landed, as they do on a GPU; see conftest.
RUN_AHEAD = False
# Whether they pad every batch, as for a CUDA graph.
PADDED = False

_ids = itertools.count()


def layers(windows):
    return tuple(LayerSpec(num_heads=1, num_kv_heads=1, head_dim=1, value_head_dim=1, window=w) for w in windows)


def _hash(tokens, positions, query):
    """Of the visible (token, position) pairs, as the query at position `query` meets them."""
    with np.errstate(over="ignore"):
        distance = np.int64(query) - np.arange(query - len(tokens) + 1, query + 1, dtype=np.int64)
        powers = np.cumprod(np.concatenate([[1], np.full(len(tokens), BASE, dtype=np.int64)]))
        return np.sum((tokens * MIX + positions) * powers[distance])


def _scores(state):
    """Logits [VOCAB] from a hash."""
    with np.errstate(over="ignore"):
        mixed = (np.int64(state) ^ (np.arange(VOCAB, dtype=np.int64) * MIX)) * np.int64(BASE)
    return ((mixed >> 11) % 1009).astype(np.float32) / 200


class FakeBackend:
    """Hashes what it reads. Trusts nothing but the batch's tensors."""

    def __init__(self, prefer_runs=False):
        self.prefer_runs = prefer_runs

    def kv_layout(self, num_blocks, block_size, num_heads, head_dim):
        return (num_blocks, block_size, num_heads, head_dim), 0

    def plan(self, batch, cache):
        return FakePlan(batch, cache)


class FakePlan:
    def __init__(self, batch, cache):
        self.batch, self.cache = batch, cache

    def run(self, layer, query, key, value, *, scale, softcap=None, sinks=None):
        spec, batch, size = self.cache.spec, self.batch, self.cache.block_size
        group, window = spec.group_of(layer), spec.layers[layer].window
        keys, values = (pool[layer].view(-1) for pool in (self.cache.keys, self.cache.values))
        slots = batch.slot_mapping[group]
        keys[slots[slots >= 0]] = key.view(-1)[slots >= 0]
        values[slots[slots >= 0]] = value.view(-1)[slots >= 0]
        keys, values, tables = keys.numpy(), values.numpy(), batch.block_tables[group].numpy()
        starts, ends = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
        out = np.zeros(len(query), dtype=np.int64)
        for row, end in enumerate(ends):
            first, last = starts[row], starts[row + 1]
            for flat in range(first, last if end else first):  # a padded row has no length
                at = end - (last - flat)
                seen = np.arange(0 if window is None else max(0, at - window + 1), at + 1)
                slots = tables[row][seen // size].astype(np.int64) * size + seen % size
                out[flat] = _hash(keys[slots], values[slots], at)
        return torch.from_numpy(out).view(-1, 1, 1)


class FakeModel:
    """See the module.

    Attributes:
        salt: stands for the weights: other keys, other fingerprint.
        poison: a token that makes the forward raise.
        before: called before each forward with the batch.
        num_tokens: for each forward, the tokens it computed.
    """

    vocab_size = num_logits = VOCAB

    def __init__(self, windows=FULL, max_positions=None):
        self.spec = CacheSpec(layers(windows), torch.int64, torch.device("cpu"))
        self.max_positions = max_positions
        self.salt = 0
        self.poison = None
        self.before = None
        self.num_tokens = []

    def fingerprint(self):
        return self.salt

    def graph_key(self):
        return 0

    def forward(self, batch, plan):
        if self.before is not None:
            self.before(batch)
        if self.poison is not None and self.poison in batch.input_ids:
            raise RuntimeError("a poisoned token")
        self.num_tokens.append(sum(row.count for row in batch.rows))
        keys = (batch.input_ids + 1 + self.salt * VOCAB).view(-1, 1, 1)
        values = (batch.positions + 1).view(-1, 1, 1)
        state = torch.zeros(len(keys), dtype=torch.int64)
        for layer in range(len(self.spec.layers)):
            state = state * MIX + plan.run(layer, keys, keys, values, scale=1.0).view(-1)
        return (
            torch.from_numpy(np.stack([_scores(s) for s in state[batch.logits_indices].numpy()]))
            if len(batch.logits_indices)
            else torch.empty(0, VOCAB)
        )


def next_logits(tokens, windows=FULL, salt=0):
    """The logits that follow on `tokens`, by definition."""
    keys = np.array(tokens, dtype=np.int64) + 1 + salt * VOCAB
    positions = np.arange(1, len(tokens) + 1, dtype=np.int64)
    state = np.int64(0)
    for window in windows:
        first = 0 if window is None else max(0, len(tokens) - window)
        with np.errstate(over="ignore"):
            state = state * np.int64(MIX) + _hash(keys[first:], positions[first:], len(tokens) - 1)
    return _scores(state)


def expected(prompt, count, windows=FULL, *, eos=(), salt=0):
    """The greedy output of a prompt, by definition."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(next_logits(tokens, windows, salt).argmax()))
        if tokens[-1] in eos:
            break
    return tokens[len(prompt) :]


def make_engine(windows=FULL, *, prefer_runs=False, max_positions=None, engine=None, **config):
    """An engine over a fake model; `engine` holds further arguments of Engine."""
    config = PagedConfig(**{"block_size": 4, "num_blocks": 64, "max_num_batched_tokens": 16, **config})
    backend, options = FakeBackend(prefer_runs), {"run_ahead": RUN_AHEAD, **(engine or {})}
    made = Engine(FakeModel(windows, max_positions), backend, config, **options)
    if PADDED:
        made.runner = PaddingRunner(made.model, backend, config, 1)
    return made


class PaddingRunner(Runner):
    """Has every batch that a graph could serve padded, and runs it eagerly."""

    def layout(self, step):
        if any(wants_prompt_logprobs(row) for row in step.rows):
            return None
        decode = leading_decode_rows(step.rows)
        return Layout(decode + 2, step.num_tokens + 5, len(step.rows) - decode + 3)

    def forward(self, step, batch, cache):
        cache.copy_blocks(step.copies)
        return self._model.forward(batch, self._backend.plan(batch, cache))


class Hold:
    """Hands logits out and waits for a push."""

    def __init__(self):
        self.logits = {}

    def sample(self, requests, logits):
        self.logits.update(zip(requests, logits, strict=True))
        return Sampled([None] * len(requests))


def make_request(prompt, max_tokens=8, *, params=None, name=None, **fields):
    """A greedy request; `params` holds further SamplingParams."""
    chosen = SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, **(params or {})})
    return Request(name or f"r{next(_ids)}", list(prompt), chosen, **fields)


def finish(engine, *requests, most=10_000):
    """Add requests and step until nothing is left to do, checking the books after each step."""
    for request in requests:
        engine.add(request)
    for _ in range(most):
        if not engine.has_work:
            break
        engine.step()
        engine.scheduler.check()
    assert not engine.has_work, f"not done after {most} steps"
    return [request.output_token_ids for request in requests]


def assert_empty(engine):
    """Nobody holds a block, and nothing waits."""
    engine.scheduler.check()
    assert engine.stats.num_free == engine.stats.num_blocks
    assert not engine.scheduler.running
    assert not engine.scheduler.waiting
