"""The engine over the fake model: whatever a request goes through, its answer is that of the request alone."""

from __future__ import annotations

import pytest
import torch
from engine import fake
from engine.fake import BOTH, FULL, WINDOW, assert_empty, expected, finish, make_engine, make_request

from hf_paged.engine import output as output_module
from hf_paged.engine.scheduler import PriorityScheduler
from hf_paged.errors import EngineClosedError, InvalidRequestError, RequestAbortedError, RequestRejectedError
from hf_paged.params import SamplingParams
from hf_paged.request import Reject, Sampled

pytestmark = pytest.mark.usefixtures("both_paces")

ALL = pytest.mark.parametrize("windows", [FULL, WINDOW, BOTH], ids=["full", "window", "both"])
RUNS = pytest.mark.parametrize("prefer_runs", [False, True], ids=["any", "runs"])


def prompts_of(count):
    return [[(7 * index + at * at) % 5 for at in range(1 + 5 * index % 23)] for index in range(count)]


def check(engine, *requests, windows=FULL):
    """All of them end with the right tokens, and leave nothing behind."""
    for request, output in zip(requests, finish(engine, *requests), strict=True):
        assert request.error is None
        assert output == expected(request.prompt_token_ids, request.params.max_tokens, windows)
    assert_empty(engine)


# ---------------------------------------------------------------------------------------------------- the same answers


@ALL
@RUNS
@pytest.mark.parametrize("budget", [1, 5, 64])
def test_chunked_prefill_mixed_with_decode(windows, prefer_runs, budget):
    engine = make_engine(windows, prefer_runs=prefer_runs, max_num_batched_tokens=budget)
    check(engine, *[make_request(prompt) for prompt in prompts_of(9)], windows=windows)
    assert max(engine.model.num_tokens) <= budget


@ALL
@RUNS
@pytest.mark.parametrize("block_size", [1, 2, 8])
def test_preemption(windows, prefer_runs, block_size):
    engine = make_engine(windows, prefer_runs=prefer_runs, block_size=block_size, num_blocks=40 // block_size)
    requests = [make_request(prompt, 14) for prompt in prompts_of(9)]
    check(engine, *requests, windows=windows)
    if windows != WINDOW:
        assert engine.stats.num_preemptions > 0
        assert sum(request.metrics.num_preemptions for request in requests) == engine.stats.num_preemptions


@ALL
@RUNS
def test_prefix_hits(windows, prefer_runs):
    engine = make_engine(windows, prefer_runs=prefer_runs)
    check(engine, make_request(range(30)), windows=windows)
    again, longer, other = make_request(range(30)), make_request(range(34)), make_request([9, *range(1, 30)])
    check(engine, again, longer, other, windows=windows)
    assert (again.num_cached, longer.num_cached, other.num_cached) == (28, 28, 0)


@ALL
@RUNS
@pytest.mark.parametrize("length", [1, 7, 8, 9])
def test_forks(windows, prefer_runs, length):
    engine = make_engine(windows, prefer_runs=prefer_runs, enable_prefix_caching=False)
    sampled = {"temperature": 1.0}
    parent = make_request(range(length), 9)
    greedy = make_request(range(length), 9, parent=parent)
    others = [make_request(range(length), 9, params={**sampled, "seed": seed}, parent=parent) for seed in range(4)]
    finish(engine, parent, greedy, *others)
    alone = [finish(make_engine(windows), make_request(range(length), params=vars(r.params)))[0] for r in others]
    assert parent.output_token_ids == greedy.output_token_ids == expected(range(length), 9, windows)
    assert [request.output_token_ids for request in others] == alone
    assert sum(engine.model.num_tokens) == length + 5 + 6 * 8
    assert_empty(engine)


@ALL
def test_forks_out_of_blocks(windows):
    """Children that lose their blocks come back when their parent's window has moved on."""
    engine = make_engine(windows, num_blocks=9, enable_prefix_caching=False)
    parent = make_request(range(11), 18)
    children = [
        make_request(range(11), 14, params={"temperature": 1.0, "seed": seed}, parent=parent) for seed in range(4)
    ]
    finish(engine, parent, *children)
    alone = [finish(make_engine(windows), make_request(range(11), params=vars(r.params)))[0] for r in children]
    assert parent.output_token_ids == expected(range(11), 18, windows)
    assert [request.output_token_ids for request in children] == alone
    assert_empty(engine)


def test_windows_free_blocks():
    """A long answer of a model with windows alone takes no more blocks than its window."""
    engine = make_engine(WINDOW, num_blocks=6, max_num_batched_tokens=8)
    check(engine, make_request(range(40), 80), windows=WINDOW)
    assert engine.stats.num_preemptions == 0


@ALL
def test_the_pool_grows_with_need(windows):
    engine = make_engine(windows, num_blocks=None)
    assert engine.stats.num_blocks == 0
    check(engine, make_request(range(5)), windows=windows)
    small = engine.stats.num_blocks
    check(engine, make_request(range(5)), *[make_request(prompt, 20) for prompt in prompts_of(9)], windows=windows)
    assert engine.stats.num_blocks > small
    assert engine.stats.num_preemptions == 0


def test_the_pool_grows_under_a_request_without_max_tokens():
    engine = make_engine(num_blocks=None)
    engine.pool._expected = lambda request: len(request.token_ids) + 4
    request = make_request(
        [1, 2], params={"max_tokens": None}, stop_check=lambda r: "stop" if r.num_output == 60 else None
    )
    assert finish(engine, request)[0] == expected([1, 2], 60)
    assert request.stop_reason == "stop"


def test_memory_comes_and_goes():
    engine = make_engine(num_blocks=None)
    check(engine, make_request(range(9)))
    assert engine.stats.pool_bytes > 0
    engine.release_memory()
    assert engine.stats.pool_bytes == engine.stats.num_blocks == 0
    again = make_request(range(9))
    check(engine, again)
    assert again.num_cached == 0


def test_memory_stays_while_there_are_requests():
    engine = make_engine()
    engine.add(request := make_request(range(9)))
    engine.step()
    engine.release_memory()
    check(engine)
    assert request.output_token_ids == expected(range(9), 8)


def test_new_weights():
    engine = make_engine()
    engine.refresh()
    check(engine, make_request(range(9)))
    engine.model.salt = 1
    engine.refresh()
    request = make_request(range(9))
    assert finish(engine, request)[0] == expected(range(9), 8, salt=1)
    engine.refresh()
    assert finish(engine, again := make_request(range(9)))[0] == request.output_token_ids
    assert (request.num_cached, again.num_cached) == (0, 8)


def test_priority():
    engine = make_engine(engine={"scheduler": PriorityScheduler}, max_num_seqs=1)
    ended = []
    requests = [make_request([p], 3, priority=p, on_token=lambda r: ended.append(r.priority)) for p in (3, 1, 2)]
    check(engine, *requests)
    assert ended == [1] * 3 + [2] * 3 + [3] * 3


# -------------------------------------------------------------------------------------------------------------- the end


def answer(**params):
    fields = {name: params.pop(name) for name in ("eos_token_ids", "stop_check") if name in params}
    request = make_request([1, 2], 12, params=params, **fields)
    finish(make_engine(), request)
    return request


def test_max_tokens():
    request = answer()
    assert (request.finish_reason, request.stop_reason, request.num_output) == ("length", None, 12)


def test_end_of_sequence():
    right = expected([1, 2], 12)
    request = answer(eos_token_ids=frozenset({right[3]}))
    assert request.output_token_ids == right[: right.index(right[3]) + 1]
    assert (request.finish_reason, request.stop_reason) == ("stop", None)
    assert answer(eos_token_ids=frozenset({right[3]}), ignore_eos=True).output_token_ids == right


def test_stop_token_ids():
    right = expected([1, 2], 12)
    request = answer(stop_token_ids=[right[5]])
    assert request.output_token_ids == right[: right.index(right[5]) + 1]
    assert (request.finish_reason, request.stop_reason) == ("stop", right[5])


def test_stop_check():
    request = answer(stop_check=lambda r: "text" if r.num_output == 4 else None)
    assert (request.finish_reason, request.stop_reason, request.num_output) == ("stop", "text", 4)


def test_min_tokens():
    right = expected([1, 2], 12)
    request = answer(eos_token_ids=frozenset({right[0]}), stop_check=lambda r: "text", min_tokens=5)
    assert request.num_output == 5
    assert right[0] not in request.output_token_ids[:5]


def test_the_models_positions_end_an_answer():
    engine = make_engine(max_positions=20)
    request = make_request(range(9), params={"max_tokens": None})
    assert finish(engine, request)[0] == expected(range(9), 11)
    assert request.finish_reason == "length"


def test_the_pool_ends_an_answer_that_has_no_end():
    """Alone, it has all blocks there are; computing it anew for ever would bring nothing."""
    engine = make_engine(num_blocks=5)
    request, other = make_request(range(9), params={"max_tokens": None}), make_request(range(5))
    finish(engine, request, other)
    assert request.output_token_ids == expected(range(9), 11)
    assert request.finish_reason == "length"
    assert other.output_token_ids == expected(range(5), 8)
    assert_empty(engine)


def test_a_request_that_the_pool_cannot_hold_any_more_is_failed():
    """Memory that could have been had on arrival is gone."""
    engine = make_engine()
    engine.add(request := make_request(range(30), 10))
    engine.pool._limit = [5]
    finish(engine, other := make_request(range(5)))
    assert isinstance(request.error, InvalidRequestError)
    assert other.output_token_ids == expected(range(5), 8)
    assert_empty(engine)


def test_abort():
    engine = make_engine()
    told = []
    requests = [make_request([index] * 9, on_token=told.append) for index in range(3)]
    for request in requests:
        engine.add(request)
    engine.abort(requests[2])
    engine.step()
    engine.abort(requests[0])
    engine.abort(requests[0])
    engine.scheduler.check()
    finish(engine)
    assert [request.finish_reason for request in requests] == ["abort", "length", "abort"]
    assert isinstance(requests[0].error, RequestAbortedError)
    assert requests[1].output_token_ids == expected([1] * 9, 8)
    assert told.count(requests[2]) == 1
    assert_empty(engine)


def test_aborting_a_stranger_touches_nobody():
    engine = make_engine()
    engine.add(request := make_request([1, 2], name="same"))
    engine.abort(make_request([3], name="same"))
    check(engine)
    assert request.finish_reason == "length"


def test_callbacks():
    told, ended = [], []
    engine = make_engine(engine={"finished": lambda r: ended.append((r.request_id, engine.stats.num_free))})
    request = make_request([1, 2], 4, name="x", on_token=lambda r: told.append((r.num_output, r.finished)))
    check(engine, request)
    assert told == [(1, False), (2, False), (3, False), (4, True)]
    assert ended == [("x", 64)]
    times = request.metrics
    order = [times.arrival_time, times.first_scheduled_time, times.first_token_time, times.finished_time]
    assert order == sorted(order)


@pytest.mark.parametrize("where", ["on_token", "stop_check"])
def test_a_callback_that_raises_ends_its_request_alone(where):
    def fail(request):
        if request.num_output == 2:
            raise ArithmeticError

    engine = make_engine()
    failing, other = make_request([1, 2], **{where: fail}), make_request([3])
    finish(engine, failing, other)
    assert isinstance(failing.error, ArithmeticError)
    assert failing.finish_reason == "error"
    assert other.output_token_ids == expected([3], 8)
    assert_empty(engine)


def test_a_callback_may_abort_others():
    engine = make_engine()
    first = make_request([1])
    second = make_request([2], on_token=lambda r: [engine.abort(x) for x in (first, third)])
    third = make_request([3])
    finish(engine, first, second, third)
    assert (first.finish_reason, third.finish_reason) == ("abort", "abort")
    assert (first.num_output, third.num_output) == (1, 0)  # the third had not been given its token yet
    assert second.output_token_ids == expected([2], 8)
    assert_empty(engine)


# ------------------------------------------------------------------------------------------------------ other samplers


class Held:
    def __init__(self):
        self.logits = {}

    def sample(self, requests, logits):
        self.logits.update(zip(requests, logits, strict=True))
        return Sampled([None] * len(requests))


@ALL
def test_held_requests_wait_for_a_push(windows):
    engine, sampler = make_engine(windows, num_blocks=8), Held()
    held = [make_request(range(9), 7, sampler=sampler), make_request(range(12), 7, sampler=sampler)]
    free = make_request(range(5), 20)
    for request in (*held, free):
        engine.add(request)
    while not all(request.finished for request in held):
        while engine.has_work:
            engine.step()
            engine.scheduler.check()
        for request in [r for r in held if r.held]:
            engine.push(request, int(sampler.logits[request].argmax()))
    check(engine, windows=windows)
    assert [r.output_token_ids for r in held] == [expected(range(9), 7, windows), expected(range(12), 7, windows)]
    assert free.output_token_ids == expected(range(5), 20, windows)


def test_push_may_stop():
    engine, sampler = make_engine(), Held()
    engine.add(request := make_request([1], sampler=sampler))
    engine.step()
    engine.push(request, 5, stop=True)
    assert (request.output_token_ids, request.finish_reason) == ([5], "stop")
    assert_empty(engine)


def test_a_sampler_may_stop():
    class Two:
        def sample(self, requests, logits):
            return Sampled(logits.argmax(-1).tolist(), [request.num_output == 1 for request in requests])

    sampler = Two()
    requests = [make_request([index], sampler=sampler, params={"min_tokens": 1}) for index in range(2)]
    finish(make_engine(), *requests)
    assert [request.output_token_ids for request in requests] == [expected([0], 2), expected([1], 2)]
    assert all(request.finish_reason == "stop" for request in requests)


@pytest.mark.parametrize("tokens", ["raises", "too few"])
def test_a_sampler_that_fails_fails_its_requests_alone(tokens):
    class Bad:
        def sample(self, requests, logits):
            return Sampled([0]) if tokens == "too few" else 1 / 0

    bad, engine = Bad(), make_engine()
    requests = [make_request([index], sampler=bad if index else None) for index in range(3)]
    finish(engine, *requests)
    error = ZeroDivisionError if tokens == "raises" else ValueError
    assert [type(request.error) for request in requests[1:]] == [error] * 2
    assert requests[0].output_token_ids == expected([0], 8)
    assert_empty(engine)


def test_each_sampler_is_called_once_a_step_with_all_of_its_requests():
    class Counting:
        def __init__(self):
            self.rows = []

        def sample(self, requests, logits):
            self.rows.append(len(requests))
            return Sampled(logits.argmax(-1).tolist())

    one, two = Counting(), Counting()
    requests = [make_request([index], 3, sampler=(one, two, None)[index % 3]) for index in range(8)]
    check(make_engine(), *requests)
    assert (one.rows, two.rows) == ([3] * 3, [3] * 3)


# ------------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("budget", [4, 64])
@pytest.mark.parametrize("at", [0, 7, 14])
def test_a_forward_that_fails_costs_the_request_at_fault(budget, at):
    """Wherever in its prompt the token lies that nobody can compute, be it in its first chunk or its last."""
    engine = make_engine(max_num_batched_tokens=budget)
    requests = [make_request([index] * 15, 6) for index in range(8)]
    met = {token for request in requests for token in expected(request.prompt_token_ids, 6)}
    engine.model.poison = poison = next(token for token in range(8, fake.VOCAB) if token not in met)
    bad = requests[3]
    bad.prompt_token_ids[at] = bad.token_ids[at] = poison
    finish(engine, *requests, most=400)
    assert "poisoned" in str(bad.error)
    for request in requests:
        assert request is bad or request.output_token_ids == expected(request.prompt_token_ids, 6)
    assert_empty(engine)


def test_a_forward_that_fails_once_costs_nobody():
    engine = make_engine()

    def fail(batch):
        engine.model.before = None
        raise MemoryError("too much at once")

    requests = [make_request([index], 6) for index in range(8)]
    for request in requests:
        engine.add(request)
    engine.step()
    engine.model.before = fail
    check(engine)
    assert [request.output_token_ids for request in requests] == [expected([index], 6) for index in range(8)]


def test_a_model_that_always_fails_fails_everyone():
    engine = make_engine()
    engine.model.before = lambda batch: 1 / 0
    requests = [make_request([index] * 7) for index in range(7)]
    finish(engine, *requests, most=100)
    assert all(isinstance(request.error, ZeroDivisionError) for request in requests)
    assert_empty(engine)


# --------------------------------------------------------------------------------------------------- refused on arrival


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (make_request([]), "the prompt is empty"),
        (make_request([1, fake.VOCAB]), r"token id 97 in prompt is outside the vocabulary \(0 to 96\)"),
        (make_request([-1, 3]), "token id -1 in prompt"),
        (make_request([1], params={"allowed_token_ids": [200]}), "token id 200 in allowed_token_ids"),
        (make_request([1], params={"logit_bias": {-3: 1.0}}), "token id -3 in logit_bias"),
        (make_request([1], banned=((1, 97),)), "token id 97 in banned"),
        (make_request([1], banned=((),)), "in banned"),
        (make_request(range(20), 13), "20 prompt tokens and max_tokens=13 make 33; the limit is 32"),
        (make_request(range(40), params={"max_tokens": None}), "the limit is 32"),
        (make_request([1, 2], parent=make_request([1, 3], name="p")), "parent 'p' has another prompt"),
        (
            make_request([1, 2], parent=make_request([1, 2], name="p"), cache_key=1),
            "parent 'p' has another prompt or cache_key",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refused(request_, message):
    engine = make_engine(max_positions=32)
    with pytest.raises(InvalidRequestError, match=message):
        engine.add(request_)
    assert not engine.has_work
    assert_empty(engine)


@ALL
def test_what_can_never_fit_is_refused_and_what_just_fits_is_served(windows):
    engine = make_engine(windows, num_blocks=6, max_num_batched_tokens=8)
    if windows != WINDOW:
        with pytest.raises(InvalidRequestError, match=r"need 7 KV blocks of 4 tokens; the pool has 6 at most"):
            engine.add(make_request(range(20), 5))
    check(engine, make_request(range(20), 4), make_request(range(16), 8), windows=windows)


def test_ids_are_taken_until_they_finish():
    engine = make_engine()
    check(engine, make_request([1], name="x"))
    engine.add(make_request([1], name="x"))
    with pytest.raises(InvalidRequestError, match="'x' is taken"):
        engine.add(make_request([2], name="x"))
    check(engine)


def test_rejected_by_a_plugin():
    engine = make_engine(engine={"admit": lambda r: Reject("busy", 1.5) if r.priority else None})
    with pytest.raises(RequestRejectedError, match="busy") as caught:
        engine.add(make_request([1], priority=1))
    assert caught.value.retry_after == 1.5
    check(engine, make_request([1]))


def test_closed():
    engine = make_engine()
    engine.add(request := make_request([1]))
    engine.close()
    engine.close()
    assert request.finish_reason == "abort"
    assert engine.stats.pool_bytes == 0
    with pytest.raises(EngineClosedError):
        engine.add(make_request([1]))


# ------------------------------------------------------------------------------------------------------------- logprobs


@pytest.mark.parametrize("blocks", [64, 9])
def test_logprobs(blocks):
    """Of the raw distribution, also where a request is preempted and computed in other chunks the second time."""
    engine = make_engine(num_blocks=blocks, max_num_batched_tokens=7)
    params = {"logprobs": 3, "prompt_logprobs": 2, "temperature": 1.3, "seed": 4, "logit_bias": {5: 3.0}}
    requests = [make_request([index, *range(11)], 9, params=params) for index in range(5)]
    finish(engine, *requests)
    for request in requests:
        tokens, length = request.token_ids, len(request.prompt_token_ids)
        right = [torch.tensor(fake.next_logits(tokens[:end])).log_softmax(-1) for end in range(1, len(tokens))]
        assert len(request.prompt_logprobs) == length
        assert request.prompt_logprobs[0] is None
        entries = [*request.prompt_logprobs[1:], *request.logprobs]
        for token, entry, row in zip(tokens[1:], entries, right, strict=True):
            assert entry[token].logprob == pytest.approx(float(row[token]), abs=1e-5)
        chosen = sum(entry[token].logprob for token, entry in zip(tokens[length:], request.logprobs, strict=True))
        assert request.cumulative_logprob == pytest.approx(chosen)
    assert blocks == 64 or engine.stats.num_preemptions > 0


def test_prompt_logprobs_of_a_single_token():
    request = make_request([1], params={"prompt_logprobs": 1})
    finish(make_engine(), request)
    assert request.prompt_logprobs == [None]


# ---------------------------------------------------------------------------------------------------------------- stats


def test_stats_and_observers():
    seen = []
    engine = make_engine(engine={"observers": [seen.append]}, max_num_batched_tokens=8)
    check(engine, make_request(range(12), 3), make_request([3], 3))
    assert sum(stats.num_prefill_tokens for stats in seen) == 13
    assert sum(stats.num_decode_tokens for stats in seen) == 4
    assert max(stats.kv_usage for stats in seen) == pytest.approx(5 / 64, abs=1 / 64)
    assert seen[0].num_running == 1
    assert seen[0].num_waiting == 1
    stats = engine.stats
    assert stats.num_blocks == 64
    assert stats.pool_bytes == 65 * 4 * 8 * 4
    assert (stats.used_tokens, stats.reserved_tokens) == (14 + 3, 16 + 4)
    assert stats.waste == pytest.approx(3 / 20)
    assert (stats.prefix_queries, stats.prefix_hits) == (13, 0)


def test_params_reach_the_sampler():
    engine = make_engine()
    request = make_request([1, 2], params={"allowed_token_ids": [4, 9]})
    assert set(finish(engine, request)[0]) <= {4, 9}
    assert isinstance(request.params, SamplingParams)


def test_a_pool_that_cannot_grow_makes_requests_wait(monkeypatch):
    """The one whose blocks are not to be had waits, or is refused if it never fits; nobody else notices."""
    engine = fake.make_engine(num_blocks=None)
    small = fake.make_request([1, 2, 3], 12)
    engine.add(small)
    engine.step()

    def fails(self, num_blocks):
        raise MemoryError("no more")

    monkeypatch.setattr(type(engine.pool.cache), "grow", fails)
    big = fake.make_request(list(range(1, 60)), 200)
    engine.add(big)
    while engine.has_work:
        engine.step()
    assert small.output_token_ids == fake.expected([1, 2, 3], 12)
    assert big.finished
    assert big.error is not None
    fake.assert_empty(engine)


def test_a_failure_beyond_the_end_of_one_request_costs_no_other(both_paces):
    """A step launched ahead computes the token after one that turns out to be the last; there it raises."""
    for seed in range(8):
        tokens = fake.expected([seed, 2], 4)
        others = fake.expected([seed, 3], 8)
        if tokens[-1] in {*tokens[:-1], *others, seed, 2, 3}:
            continue
        engine = fake.make_engine()
        engine.model.poison = tokens[-1]
        ends = fake.make_request([seed, 2], 8, params={"stop_token_ids": [tokens[-1]]})
        other = fake.make_request([seed, 3], 8)
        assert fake.finish(engine, ends, other) == [tokens, others]
        assert (ends.error, other.error) == (None, None)
        fake.assert_empty(engine)


def test_a_request_that_a_callback_aborts_has_a_log_probability_for_each_token():
    engine = make_engine()
    second = make_request([3], params={"logprobs": 1})
    first = make_request([1], params={"logprobs": 1}, on_token=lambda r: r.num_output == 3 and engine.abort(second))
    finish(engine, first, second)
    assert (second.finish_reason, second.num_output) == ("abort", 2)
    assert second.logprobs is not None
    assert len(second.logprobs) == 2


@pytest.mark.parametrize("what", ["prompt", "output"])
def test_log_probabilities_that_fail_cost_no_other_request(both_paces, monkeypatch, what):
    name, asked = f"add_{what}_logprobs", {"prompt_logprobs": 1} if what == "prompt" else {"logprobs": 1}
    requests = [make_request([index, 2, 3], 5, params=asked) for index in range(3)]
    original = getattr(output_module, name)

    def raising(row, *rest):
        if getattr(row, "request", row) is requests[1]:
            raise RuntimeError("no memory for them")
        original(row, *rest)

    monkeypatch.setattr(output_module, name, raising)
    engine = make_engine()
    found = finish(engine, *requests)
    assert [request.finish_reason for request in requests] == ["length", "error", "length"]
    assert str(requests[1].error) == "no memory for them"
    assert [found[0], found[2]] == [expected([0, 2, 3], 5), expected([2, 2, 3], 5)]
    assert_empty(engine)
