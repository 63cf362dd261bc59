"""The sampler: each parameter against its plain definition, and no row disturbs another."""

from __future__ import annotations

import math

import pytest
import torch
from engine import fake

from hf_paged.engine.batch_sampler import BatchSampler, filtered
from hf_paged.engine.logprobs import top_logprobs
from hf_paged.params import SamplingParams
from hf_paged.request import Request, Sampled

VOCAB = 23


def request(prompt=(1, 2), output=(), *, eos=(), banned=(), **params):
    made = Request("r", list(prompt), SamplingParams(**params), eos_token_ids=frozenset(eos), banned=banned)
    made.token_ids += output
    return made


def logits_of(seed=0, rows=1):
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def kept(logits, **params):
    """Which tokens of one row may be drawn, as a set, and their probabilities."""
    row = filtered(logits, [SamplingParams(**params)])[0]
    return {i for i, value in enumerate(row.tolist()) if value > -math.inf}, row.softmax(-1)


def greedy_choice(logits, **params):
    chosen = request(temperature=0, **params)
    return BatchSampler().sample([chosen], logits).token_ids[0]


# ------------------------------------------------------------------------------------------------------------- filters


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 2.0])
def test_temperature(temperature):
    logits = logits_of()
    torch.testing.assert_close(kept(logits, temperature=temperature)[1], (logits[0] / temperature).softmax(-1))


@pytest.mark.parametrize("top_k", [-1, 0, 1, 5, VOCAB, VOCAB + 5])
def test_top_k(top_k):
    logits = logits_of()
    count = top_k if 0 < top_k < VOCAB else VOCAB
    assert kept(logits, top_k=top_k)[0] == set(logits[0].topk(count).indices.tolist())


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.5, 0.9, 0.999, 1.0])
def test_top_p_is_the_smallest_set_that_reaches_it(top_p):
    logits = logits_of(1)
    probabilities = logits[0].double().softmax(-1)
    smallest, mass = set(), 0.0
    for token in probabilities.argsort(descending=True).tolist():
        smallest.add(token)
        mass += probabilities[token]
        if mass >= top_p:
            break
    assert kept(logits, top_p=top_p)[0] == smallest


@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.3, 1.0])
def test_min_p(min_p):
    logits = logits_of(2)
    probabilities = logits[0].softmax(-1)
    assert kept(logits, min_p=min_p)[0] == {i for i, p in enumerate(probabilities) if p >= min_p * probabilities.max()}


def test_top_p_counts_what_top_k_kept():
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0]]).log()
    assert kept(logits, top_k=2, top_p=0.5)[0] == {0}  # 4/7 of what is kept, though 4/10 of all
    assert kept(logits, top_p=0.5)[0] == {0, 1}


def test_temperature_comes_before_min_p():
    logits = torch.tensor([[1.0, 0.0]])
    assert kept(logits, temperature=2.0, min_p=0.5)[0] == {0, 1}
    assert kept(logits, temperature=1.0, min_p=0.5)[0] == {0}


def test_rows_are_filtered_by_their_own_parameters():
    """A row's result is the same to the last bit, whatever its neighbours ask for."""
    chosen = [
        SamplingParams(),
        SamplingParams(top_k=2),
        SamplingParams(top_p=0.4),
        SamplingParams(min_p=0.2, temperature=0.5),
    ]
    logits = torch.randn(len(chosen), 5000) * 8  # a tail so thin that the sum of the rest rounds to 1
    together = filtered(logits, chosen)
    for index, params in enumerate(chosen):
        assert torch.equal(together[index], filtered(logits[index : index + 1], [params])[0])


# --------------------------------------------------------------------------------------------------------- constraints


def test_greedy_takes_the_most_likely():
    logits = logits_of(rows=4)
    requests = [request(temperature=0) for _ in range(4)]
    assert BatchSampler().sample(requests, logits).token_ids == logits.argmax(-1).tolist()


def test_the_logits_handed_in_are_not_changed():
    logits = logits_of()
    before = logits.clone()
    BatchSampler().sample([request(logit_bias={1: 5.0}, repetition_penalty=2.0, temperature=0.5)], logits)
    assert torch.equal(logits, before)


def test_logit_bias():
    assert greedy_choice(logits_of(), logit_bias={5: 100.0}) == 5
    best = int(logits_of().argmax())
    assert greedy_choice(logits_of(), logit_bias={best: -100.0}) != best


def test_allowed_token_ids():
    logits = logits_of()
    assert greedy_choice(logits, allowed_token_ids=[3, 7, 9]) == max((3, 7, 9), key=lambda i: logits[0, i])
    drawn = [BatchSampler(seed=s).sample([request(allowed_token_ids=[3, 7])], logits).token_ids[0] for s in range(30)]
    assert set(drawn) <= {3, 7}


def test_min_tokens_bans_every_end():
    logits = torch.zeros(1, VOCAB)
    logits[0, [4, 6, 8]] = torch.tensor([9.0, 8.0, 7.0])
    params = {"eos": {4}, "stop_token_ids": [6], "min_tokens": 2}
    assert greedy_choice(logits, **params) == 8
    assert greedy_choice(logits, output=[1], **params) == 8
    assert greedy_choice(logits, output=[1, 1], **params) == 4


def test_ends_outside_the_vocabulary_are_ignored():
    """Tiny models' configs name the eos id of the family's large one."""
    logits = logits_of()
    assert greedy_choice(logits, eos={50256}, stop_token_ids=[-1, VOCAB], min_tokens=3) == int(logits.argmax())


@pytest.mark.parametrize(
    ("output", "banned"),
    [((), True), ((4,), True), ((9, 4), True), ((4, 9), True)],
)
def test_a_single_banned_token(output, banned):
    logits = torch.zeros(1, VOCAB)
    logits[0, 5] = 9.0
    assert (greedy_choice(logits, output=output, banned=((5,),)) != 5) == banned


@pytest.mark.parametrize(
    ("output", "banned"),
    [((), False), ((4,), False), ((3, 4), True), ((9, 3, 4), True), ((3, 4, 9), False), ((4, 3), False)],
)
def test_a_banned_sequence_counts_in_the_output_alone(output, banned):
    logits = torch.zeros(1, VOCAB)
    logits[0, 5] = 9.0
    assert (greedy_choice(logits, prompt=(3, 4), output=output, banned=((3, 4, 5),)) != 5) == banned


def test_repetition_penalty_over_prompt_and_output():
    logits = torch.tensor([[2.0, -1.0, 1.5, 1.9]])
    params = {"prompt": (0, 1), "repetition_penalty": 1.5}
    assert greedy_choice(logits, **params) == 3
    assert greedy_choice(logits, output=(3, 3), **params) == 2
    only = torch.tensor([[-1.0, -1.2]])
    assert greedy_choice(only, prompt=(0,), repetition_penalty=1.5) == 1  # negative ones are multiplied


def test_presence_and_frequency_penalty_over_the_output():
    logits = torch.tensor([[2.0, 1.0, 0.5]])
    assert greedy_choice(logits, prompt=(0, 0, 0), presence_penalty=2.0) == 0
    assert greedy_choice(logits, output=(0,), presence_penalty=0.9) == 0
    assert greedy_choice(logits, output=(0, 0, 0), presence_penalty=0.9) == 0
    assert greedy_choice(logits, output=(0,), frequency_penalty=0.4) == 0
    assert greedy_choice(logits, output=(0, 0, 0), frequency_penalty=0.4) == 1
    assert greedy_choice(logits, output=(1,), presence_penalty=-2.0) == 1


# --------------------------------------------------------------------------------------------------------------- draws


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(4000, 1)
    tokens = BatchSampler(seed=0).sample([request() for _ in range(4000)], logits).token_ids
    shares = torch.tensor(tokens).bincount(minlength=4) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.03, rtol=0)


def test_seeded_draws_follow_the_distribution_over_positions_and_seeds():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log().repeat(3000, 1)
    requests = [request(output=[0] * (i % 50), seed=i // 50) for i in range(3000)]
    shares = torch.tensor(BatchSampler().sample(requests, logits).token_ids).bincount(minlength=3) / 3000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.04, rtol=0)


def test_a_seed_makes_draws_the_requests_own():
    """Alone, among others, in another order, beside greedy rows: the same tokens."""
    logits = logits_of(rows=6)
    requests = [request(seed=i, temperature=1.5, top_p=0.9 if i % 2 else 1.0) for i in range(6)]
    together = BatchSampler(seed=1).sample(requests, logits).token_ids
    alone = [BatchSampler(seed=2).sample([r], logits[i : i + 1]).token_ids[0] for i, r in enumerate(requests)]
    order = [4, 0, 5, 2, 1, 3]
    mixed = [x for i in order for x in (request(), requests[i], request(temperature=0))]
    rows = logits[[i for i in order for _ in range(3)]]
    shuffled = BatchSampler(seed=3).sample(mixed, rows).token_ids[1::3]
    assert together == alone
    assert shuffled == [together[i] for i in order]


def test_draws_of_seeds_and_positions_differ():
    logits = torch.zeros(64, 4096)
    seeds = BatchSampler().sample([request(seed=i) for i in range(64)], logits).token_ids
    positions = BatchSampler().sample([request(seed=1, output=[0] * i) for i in range(64)], logits).token_ids
    assert len(set(seeds)) > 55
    assert len(set(positions)) > 55


def test_an_engine_seed_repeats_the_unseeded_draws():
    logits = torch.zeros(8, 4096)
    draw = lambda seed: BatchSampler(seed=seed).sample([request() for _ in range(8)], logits).token_ids  # noqa: E731
    assert draw(5) == draw(5) != draw(6)


def test_processors_run_before_every_sampler():
    class Only:
        def process(self, requests, logits):
            assert logits.dtype == torch.float32
            return logits.index_fill(-1, torch.tensor([7]), 1e4)

    class Mine:
        def sample(self, requests, logits):
            return Sampled(logits.argmax(-1).tolist())

    made = [fake.make_request([1, 2, 3], 2), fake.make_request([4, 5], 2, params={"temperature": 1.0, "logprobs": 0})]
    made.append(fake.make_request([6], 2, sampler=Mine()))
    assert fake.finish(fake.make_engine(engine={"processors": [Only()]}), *made) == [[7, 7]] * 3
    assert made[1].logprobs[0][7].rank > 1  # of the raw distribution


def test_seeded_requests_do_not_depend_on_the_engines_batch():
    prompts = [[i, i + 1, i + 2] for i in range(8)]
    made = [fake.make_request(p, 9, params={"temperature": 1.2, "seed": 3}) for p in prompts]
    together = fake.finish(fake.make_engine(num_blocks=10), *made)
    alone = [
        fake.finish(fake.make_engine(), fake.make_request(r.prompt_token_ids, params=vars(r.params)))[0] for r in made
    ]
    assert together == alone
    assert len({tuple(tokens) for tokens in together}) > 1


# ------------------------------------------------------------------------------------------------------------ logprobs


@pytest.mark.parametrize(("count", "number"), [(0, 1), (1, 2), (5, 6), (-1, VOCAB)])
def test_top_logprobs(count, number):
    logits = logits_of()[0]
    token = int(logits.argsort()[0])  # the least likely: never among the top ones
    found = top_logprobs(logits, token, count)
    right = logits.double().log_softmax(-1)
    assert len(found) == number
    assert next(iter(found)) == token
    ranked = logits.argsort(descending=True).tolist()
    for index, entry in found.items():
        assert entry.logprob == pytest.approx(float(right[index]), abs=1e-5)
        assert ranked[entry.rank - 1] == index
