"""A request that begins with output of its own goes on as the undisturbed one did, whatever its parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import zoo
from hf_paged import LLM, SamplingParams
from hf_paged.request import Request

LENGTH = 16
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 1.0, "seed": 3, "top_p": 0.9},
    "penalties": {"temperature": 0.0, "presence_penalty": 1.5, "frequency_penalty": 0.7, "repetition_penalty": 1.3},
    "min_tokens": {"temperature": 1.0, "seed": 5, "min_tokens": 12, "logit_bias": {zoo.EOS: 6.0}},
    "logprobs": {"temperature": 0.0, "logprobs": 2},
    "bad_words": {"temperature": 0.0},
}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(zoo.build("llama"), skip_tokenizer_init=True, block_size=4) as made:
        yield made


def run(llm: LLM, case: str, resume_from: list[int]) -> Request:
    params = SamplingParams(max_tokens=LENGTH, **CASES[case])
    eos = frozenset([zoo.EOS])
    request = Request("r", [5, 6, 7, 8, 9], params, eos_token_ids=eos, resume_from=resume_from)
    if case == "bad_words":
        request.banned = ((first_token(llm),),)
    _, thread = llm.engine()
    thread.run([request])
    return request


def first_token(llm: LLM) -> int:
    return (
        llm.generate([5, 6, 7, 8, 9], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)[0]
        .outputs[0]
        .token_ids[0]
    )


@pytest.mark.parametrize("case", CASES)
def test_it_goes_on_as_if_nothing_had_happened(llm: LLM, case: str) -> None:
    whole = run(llm, case, [])
    tokens = whole.output_token_ids
    for cut in range(1, len(tokens)):
        resumed = run(llm, case, tokens[:cut])
        assert resumed.output_token_ids == tokens
        assert (resumed.finish_reason, resumed.stop_reason) == (whole.finish_reason, whole.stop_reason)
        assert resumed.prompt_token_ids == [5, 6, 7, 8, 9]
        if case == "logprobs":
            assert resumed.logprobs is not None
            assert whole.logprobs is not None
            assert [list(entry) for entry in resumed.logprobs] == [list(entry) for entry in whole.logprobs[cut:]]
            values = [entry[t].logprob for entry, t in zip(resumed.logprobs, tokens[cut:], strict=True)]
            assert resumed.cumulative_logprob == pytest.approx(sum(values))


def test_a_restart_keeps_the_logprobs_of_a_resumed_one(llm: LLM) -> None:
    _, thread = llm.engine()
    engine = thread.engine
    whole = run(llm, "logprobs", [])
    params = SamplingParams(max_tokens=LENGTH, temperature=0.0, logprobs=2)
    request = Request("r", [5, 6, 7, 8, 9], params, resume_from=whole.output_token_ids[:6])
    engine.add(request)
    while engine.has_work:
        engine.step()
        engine.restart()
    assert request.output_token_ids == whole.output_token_ids
    assert request.logprobs is not None
    assert len(request.logprobs) == LENGTH - 6
