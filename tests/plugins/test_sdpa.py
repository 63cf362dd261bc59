"""The SDPA backend against attention by its definition, in float64 over dense keys."""

from __future__ import annotations

import random

import pytest
import torch

from hf_paged.batch import CacheSpec, LayerSpec, Scheduled, Step
from hf_paged.engine.batch import BatchBuilder
from hf_paged.engine.cache import PagedKVCache
from hf_paged.request import Request
from hf_paged_sdpa.attend import attend, merge
from hf_paged_sdpa.backend import MOST_RUNS, SDPABackend

SIZE = 4  # tokens of a block
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """The tensors here are tiny: waking threads for them costs more than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Case:
    """Rows (start, count) over one layer, with random keys and values that are in the cache up to each row's start."""

    def __init__(
        self, rows, *, heads=4, kv_heads=2, dim=8, value_dim=None, window=None, dtype=torch.float32, tables=None
    ):
        generator = torch.Generator().manual_seed(0)
        layer = LayerSpec(heads, kv_heads, dim, value_dim or dim, window)
        self.rows, self.layer, self.dtype = rows, layer, dtype
        self.spec = CacheSpec((layer,), dtype, torch.device("cpu"))
        ends = [start + count for start, count in rows]
        self.tables = tables or contiguous(ends)
        num_blocks = max(max(table) for table in self.tables) + 1
        self.backend = SDPABackend()
        self.cache = PagedKVCache(self.spec, self.backend, [num_blocks], SIZE)
        for pool in (*self.cache.keys, *self.cache.values):
            pool.fill_(torch.nan)  # what nobody wrote must not be read
        self.keys = [torch.randn(end, kv_heads, dim, generator=generator).to(dtype) for end in ends]
        self.values = [torch.randn(end, kv_heads, value_dim or dim, generator=generator).to(dtype) for end in ends]
        self.query = torch.randn(sum(count for _, count in rows), heads, dim, generator=generator).to(dtype)
        self.sinks = torch.randn(heads, generator=generator).to(dtype)

    def run(self, *, scale=0.3, **options):
        """The backend's output [T, heads, value_dim]."""
        self._fill()
        shares = []
        for (start, count), table in zip(self.rows, self.tables, strict=True):
            request = Request("r", list(range(start + count)))
            request.tables = [table]
            shares.append(Scheduled(request, start, count))
        batch = BatchBuilder(SIZE, 1, torch.device("cpu")).build(Step(shares))
        key = torch.cat([k[start:] for k, (start, _) in zip(self.keys, self.rows, strict=True)])
        value = torch.cat([v[start:] for v, (start, _) in zip(self.values, self.rows, strict=True)])
        plan = self.backend.plan(batch, self.cache)
        output = plan.run(0, self.query, key, value, scale=scale, **options)
        assert output.dtype == self.dtype
        self._check_written()
        return output

    def right(self, *, scale=0.3, softcap=None, sinks=None):
        """The same by definition."""
        outputs, first = [], 0
        group = self.layer.num_heads // self.layer.num_kv_heads
        for (start, count), k, v in zip(self.rows, self.keys, self.values, strict=True):
            q = self.query[first : first + count].double()
            k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            at, key = torch.arange(start, start + count)[:, None], torch.arange(len(k))[None]
            seen = key <= at
            if self.layer.window is not None:
                seen &= at - key < self.layer.window
            scores = scores.masked_fill(~seen, -torch.inf)
            if sinks is not None:
                scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, count, 1)], -1)
            weights = scores.softmax(-1)[..., : len(k)]
            outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
            first += count
        return torch.cat(outputs)

    def check(self, **options):
        output, right = self.run(**options), self.right(**options)
        tolerance = TOLERANCE[self.dtype]
        torch.testing.assert_close(output.double(), right, rtol=tolerance, atol=tolerance)

    def _slots(self, table, start, end):
        return [table[p // SIZE] * SIZE + p % SIZE for p in range(start, end)]

    def _fill(self):
        for (start, _), table, key, value in zip(self.rows, self.tables, self.keys, self.values, strict=True):
            # Blocks that no query sees any more are given up, as the tables do.
            window = self.layer.window
            first = 0 if window is None else max(0, start - window + 1) // SIZE
            table[:first] = [0] * first
            slots = self._slots(table, first * SIZE, start)
            self.cache.keys[0].flatten(1, 2)[:, slots] = key[first * SIZE : start].transpose(0, 1)
            self.cache.values[0].flatten(1, 2)[:, slots] = value[first * SIZE : start].transpose(0, 1)

    def _check_written(self):
        for (start, count), table, key, value in zip(self.rows, self.tables, self.keys, self.values, strict=True):
            slots = self._slots(table, start, start + count)
            assert torch.equal(self.cache.keys[0].flatten(1, 2)[:, slots].transpose(0, 1), key[start:])
            assert torch.equal(self.cache.values[0].flatten(1, 2)[:, slots].transpose(0, 1), value[start:])


def contiguous(ends):
    tables, block = [], 1
    for end in ends:
        blocks = -(-end // SIZE)
        tables.append(list(range(block, block + blocks)))
        block += blocks
    return tables


def scattered(ends, seed=0, stretch=1):
    """Tables whose blocks lie in stretches of that length, in random order."""
    blocks = [list(range(i, i + stretch)) for i in range(1, 400, stretch)]
    random.Random(seed).shuffle(blocks)
    free = [block for run in blocks for block in run]
    tables = []
    for end in ends:
        needed = -(-end // SIZE)
        tables.append(free[:needed])
        free = free[needed:]
    return tables


def random_rows(seed):
    """Decode rows, whole prompts and chunks over what is in the cache already."""
    pick = random.Random(seed)
    kinds = [
        lambda: (pick.randint(0, 40), 1),
        lambda: (0, pick.randint(1, 25)),
        lambda: (pick.randint(1, 30), pick.randint(2, 15)),
    ]
    return [pick.choice(kinds)() for _ in range(pick.randint(1, 7))]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_ragged_batches(seed, heads):
    Case(random_rows(seed), heads=heads[0], kv_heads=heads[1]).check()


@pytest.mark.parametrize("window", [1, 2, 4, 7, 100])
@pytest.mark.parametrize("seed", range(5))
def test_windows(seed, window):
    Case(random_rows(seed), window=window).check()


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("stretch", [1, 2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_blocks_all_over_the_pool(seed, stretch, window):
    rows = random_rows(seed)
    Case(rows, tables=scattered([s + c for s, c in rows], seed, stretch), window=window).check()


@pytest.mark.parametrize("runs", [MOST_RUNS, MOST_RUNS + 1])
@pytest.mark.parametrize("count", [1, 3])
def test_as_many_runs_as_are_attended_apart_and_one_more(runs, count):
    tables = [[1 + 2 * index for index in range(runs)]]
    Case([(runs * SIZE - count, count)], tables=tables).check(sinks=None)


@pytest.mark.parametrize("options", ["softcap", "sinks", "softcap sinks"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("seed", range(3))
def test_softcap_and_sinks(seed, window, options):
    rows = random_rows(seed)
    case = Case(rows, window=window, tables=scattered([s + c for s, c in rows], seed))
    given = {"softcap": 1.5 if "softcap" in options else None, "sinks": case.sinks if "sinks" in options else None}
    case.check(scale=1.0, **given)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("value_dim", [3, 16])
def test_value_heads_of_another_size(value_dim, window):
    Case(random_rows(1), value_dim=value_dim, window=window).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"window": 5}, {"value_dim": 4}])
def test_dtypes(dtype, options):
    for seed in range(3):
        rows = random_rows(seed)
        case = Case(rows, dtype=dtype, tables=scattered([s + c for s, c in rows], seed, 2), **options)
        case.check()
        case.check(sinks=case.sinks)


def test_large_scores_do_not_overflow():
    Case(random_rows(2)).check(scale=300.0)


def test_queries_as_transformers_hands_them_over():
    """Transposed views of [1, heads, T, dim]."""
    case = Case([(5, 1), (0, 6), (3, 4)])
    case.query = case.query.transpose(0, 1).contiguous().transpose(0, 1)
    case.check()


def test_one_query_row_of_the_batch_does_not_change_another():
    rows = random_rows(4)
    together, alone, first = Case(rows), Case(rows), 0
    output = together.run()
    for index, row in enumerate(rows):
        own = slice(first, first + row[1])
        single = Case([row])
        single.keys, single.values, single.query = [alone.keys[index]], [alone.values[index]], alone.query[own]
        torch.testing.assert_close(single.run(), output[own])
        first += row[1]


def test_two_groups_of_layers_have_their_own_tables():
    """Full and windowed layers of one model, in any order."""
    spec = CacheSpec(tuple(LayerSpec(2, 1, 4, 4, window) for window in (3, None)), torch.float32, torch.device("cpu"))
    backend = SDPABackend()
    cache = PagedKVCache(spec, backend, [4, 8], SIZE)
    request = Request("r", list(range(6)))
    request.tables = [[2, 1], [5, 7]]  # full attention's group comes first
    batch = BatchBuilder(SIZE, 2, torch.device("cpu")).build(Step([Scheduled(request, 0, 6)]))
    query, key, value = torch.randn(6, 2, 4), torch.randn(6, 1, 4), torch.randn(6, 1, 4)
    plan = backend.plan(batch, cache)
    at = torch.arange(6)
    for layer, window in ((0, 3), (1, 6)):
        output = plan.run(layer, query, key, value, scale=0.5)
        far = (at[None] > at[:, None]) | (at[:, None] - at[None] >= window)
        weights = (torch.einsum("qhd,kd->hqk", query, key[:, 0]) * 0.5).masked_fill(far, -torch.inf).softmax(-1)
        torch.testing.assert_close(output, torch.einsum("hqk,kd->qhd", weights, value[:, 0]))
    assert torch.equal(cache.keys[0][0, 5], key[:4, 0])
    assert torch.equal(cache.keys[1][0, 2], key[:4, 0])


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_merging_parts_is_attending_to_all(softcap):
    query, key, value = torch.randn(2, 3, 5, 8), torch.randn(2, 12, 8), torch.randn(2, 12, 8)
    whole, lse = attend(query, key, value, 0.4, softcap=softcap)
    parts = [
        attend(query, key[:, s], value[:, s], 0.4, softcap=softcap) for s in (slice(0, 1), slice(1, 9), slice(9, 12))
    ]
    merged, total = merge(parts)
    torch.testing.assert_close(merged, whole)
    torch.testing.assert_close(total, lse)
