"""Which graph serves a step; capturing itself is tried on a GPU, in tests/hf/test_gpu_engine.py."""

from __future__ import annotations

import pytest
import torch
from engine.fake import FakeBackend, FakeModel, make_request

from hf_paged.batch import Layout, Scheduled, Step
from hf_paged.config import PagedConfig
from hf_paged.engine.graphs import BACKLOG, MANY_ROWS, MIXED_PROMPTS, MIXED_TOKENS, PATIENCE, Graphs, decode_sizes


class FakeCache:
    key = "the only one"


def graphs(**config):
    return Graphs(FakeModel(), FakeBackend(), PagedConfig(**{"keep_pool": True, **config}), 16)


def step(decode, prompts=()):
    """Decode rows, then prompts of these lengths."""
    rows = [Scheduled(make_request([1, 2, 3]), 2, 1) for _ in range(decode)]
    return Step(rows + [Scheduled(make_request([1] * length), 0, length) for length in prompts])


SIZES = {1: [1], 3: [1, 2, 4], 20: [1, 2, 4, 8, 16, 32], 130: [1, 2, 4, 8, *range(16, 129, 16), 160]}


@pytest.mark.parametrize(("most", "sizes"), SIZES.items())
def test_decode_sizes(most, sizes):
    assert decode_sizes(most) == sizes


def test_the_smallest_layout_that_holds_a_step():
    own = graphs(max_num_seqs=256)
    assert own.layout(step(1)) == Layout(1, 1, 0)
    assert own.layout(step(9)) == Layout(16, 16, 0)
    assert own.layout(step(256)) == Layout(256, 256, 0)
    assert own.layout(step(0, [5])) == Layout(0, 64, MIXED_PROMPTS)
    assert own.layout(step(3, [60, 70])) == Layout(16, 16 + 256, MIXED_PROMPTS)
    assert own.layout(step(129, [2048])) == Layout(256, 256 + 2048, MIXED_PROMPTS)


def test_steps_that_no_graph_serves():
    own = graphs(max_num_seqs=8)
    assert own.layout(step(9)) is None
    assert own.layout(step(1, [MIXED_TOKENS[-1] + 1])) is None
    assert own.layout(step(1, [2] * (MIXED_PROMPTS + 1))) is None


def test_beside_many_decode_rows_prompts_go_a_tile_in_each_step():
    own = graphs(max_num_seqs=256)
    for rows in (129, 200, 256):
        assert own.prompt_tokens(rows, 700) == 256
        assert own.layout(step(rows, [256])).tokens == 512
    assert own.prompt_tokens(256, BACKLOG) == BACKLOG  # too many wait
    assert own.prompt_tokens(MANY_ROWS, 700) == 700
    assert own.prompt_tokens(257, 700) == 700  # no graph serves so many rows
    assert graphs(max_num_seqs=400).prompt_tokens(300, 700) == 352  # 416 decode rows have a graph


def test_where_the_pool_is_given_back_graphs_have_to_be_wanted_often():
    own = graphs(keep_pool=None)
    assert [own.layout(step(1)) for _ in range(PATIENCE)] == [None] * PATIENCE
    assert own.layout(step(1)) == Layout(1, 1, 0)
    assert own.layout(step(2)) is None  # another one


def behind_another():
    """A capture that can't be ended hides why."""
    try:
        raise torch.OutOfMemoryError("CUDA out of memory")
    except torch.OutOfMemoryError:
        raise RuntimeError("capture was invalidated")  # noqa: B904


def raised(error):
    raise error


FAILURES = [
    (lambda: raised(torch.OutOfMemoryError("CUDA out of memory")), 1),
    (lambda: raised(RuntimeError("CUDA error: out of memory")), 1),
    (lambda: raised(RuntimeError("operation not permitted")), 0),
    (behind_another, 1),
]


@pytest.mark.parametrize(("fail", "left"), FAILURES)
def test_out_of_memory_steps_that_prefill_go_without_graphs_first(monkeypatch, fail, left):
    own, cache = graphs(max_num_seqs=8), FakeCache()
    captured = []

    def capture(layout, cache):
        if layout.prompts:
            fail()
        own._graphs[layout] = None
        captured.append(layout)

    monkeypatch.setattr(own, "_capture", capture)
    own.capture_all(cache)
    assert captured == [Layout(size, size, 0) for size in (8, 4, 2, 1)] * left
    assert own.layout(step(1, [5])) is None
    assert own.layout(step(3)) == (Layout(4, 4, 0) if left else None)
    assert own.prompt_tokens(8, 700) == 700


def test_out_of_memory_twice_nothing_is_captured(monkeypatch):
    own = graphs(max_num_seqs=8)

    def capture(layout, cache):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(own, "_capture", capture)
    own.capture_all(FakeCache())
    assert own.layout(step(3)) is None
