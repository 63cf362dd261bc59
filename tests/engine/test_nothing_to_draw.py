"""Where constraints leave no token, the request ends with an error that says so, and the others go on."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

import zoo
from hf_paged import LLM, ConfigError, InvalidRequestError, RequestFailedError, SamplingParams
from hf_paged.engine.batch_sampler import BatchSampler
from hf_paged.request import Request

TOKENIZER = tiny.tokenizer()
A = TOKENIZER.encode("a", add_special_tokens=False)[0]
B = TOKENIZER.encode("b", add_special_tokens=False)[0]
FROM_THE_START: dict[str, dict[str, Any]] = {
    "banned": {"allowed_token_ids": [A], "bad_words": ["a"]},
    "ends": {"allowed_token_ids": [zoo.EOS], "min_tokens": 3},
    "stops": {"allowed_token_ids": [A], "stop_token_ids": [A], "min_tokens": 2},
    "both": {"allowed_token_ids": [A, B], "bad_words": ["b"], "stop_token_ids": [A], "min_tokens": 2},
}
LATER: dict[str, dict[str, Any]] = {
    "banned": {"allowed_token_ids": [A], "bad_words": ["aa"]},
    "several": {"allowed_token_ids": [A, B], "bad_words": ["b", "aaa"]},
}


@pytest.fixture(scope="module")
def llm() -> Any:
    with LLM(zoo.build("llama"), tokenizer=tiny.tokenizer(), block_size=4) as made:
        yield made


@pytest.mark.parametrize("name", FROM_THE_START)
def test_it_is_refused_where_it_can_be_told_before(llm: LLM, name: str) -> None:
    with pytest.raises(InvalidRequestError, match="no token may be drawn: bad_words and min_tokens=. forbid all of "):
        llm.generate("x", SamplingParams(temperature=0.0, max_tokens=6, **FROM_THE_START[name]), use_tqdm=False)


@pytest.mark.parametrize("name", LATER)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_its_request_alone_ends_with_an_error(llm: LLM, name: str, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, max_tokens=6, seed=1)
    other = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    with pytest.warns(UserWarning, match="1 of 3 prompts failed"):
        first, failed, last = llm.generate(
            ["x", "y", "z"], [other, params.replace(**LATER[name]), other], use_tqdm=False
        )
    assert (failed.outputs[0].finish_reason, set(failed.outputs[0].text)) == ("error", {"a"})
    assert isinstance(failed.outputs[0].error, InvalidRequestError)
    assert "no token may be drawn" in str(failed.outputs[0].error)
    assert [len(output.outputs[0].token_ids) for output in (first, last)] == [6, 6]
    assert [first.outputs[0].token_ids, last.outputs[0].token_ids] == [
        output.outputs[0].token_ids for output in llm.generate(["x", "z"], other, use_tqdm=False)
    ]
    assert llm.stats.num_free == llm.stats.num_blocks
    with pytest.raises(RequestFailedError, match="prompt 1: .*no token may be drawn") as raised:
        llm.generate(["x", "y"], [other, params.replace(**LATER[name])], use_tqdm=False, raise_on_error=True)
    assert raised.value.index == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_no_choice_of_nothing(temperature: float) -> None:
    """Of a request without constraints: whatever the others in its batch ask for."""
    given: list[dict[str, Any]] = [{}, {"min_tokens": 3}, {"allowed_token_ids": [3, 4]}, {"min_tokens": 0}]
    params = [SamplingParams(temperature=temperature, seed=1, **one) for one in given]
    requests = [Request(str(i), [5], one, eos_token_ids=frozenset([2])) for i, one in enumerate(params)]
    for value in (float("nan"), float("-inf")):
        logits = torch.full((4, 8), value)
        logits[2] = torch.tensor([1.0, 1, 1, value, value, 1, 1, 1])
        tokens = BatchSampler().sample(requests, logits).token_ids
        assert tokens[0] >= 0
        assert tokens[3] >= 0
        assert (tokens[2] < 0) == (value == float("-inf"))


@pytest.mark.parametrize("bias", [1e39, float("inf"), float("-inf"), float("nan"), -1e31])
def test_biases_are_finite(bias: float) -> None:
    with pytest.raises(ConfigError, match=r"logit_bias must be numbers in \[-1e\+30, 1e\+30\]"):
        SamplingParams(logit_bias={A: bias})


def test_the_largest_bias(llm: LLM) -> None:
    (output,) = llm.generate("x", SamplingParams(logit_bias={A: 1e30}, max_tokens=3), use_tqdm=False)
    assert output.outputs[0].token_ids == [A] * 3
