"""SamplingParams: vLLM's names, defaults and validation."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from hf_paged.errors import ConfigError
from hf_paged.params import SamplingParams

DEFAULTS = {
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "stop": None,
    "stop_token_ids": None,
    "ignore_eos": False,
    "max_tokens": 16,
    "min_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
    "detokenize": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "structured_outputs": None,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": None,
    "extra_args": None,
}

ALLOWED = [
    {"n": 3},
    {"presence_penalty": -2},
    {"presence_penalty": 2.0},
    {"frequency_penalty": -2.0},
    {"frequency_penalty": 2},
    {"repetition_penalty": 0.01},
    {"temperature": 0},
    {"temperature": 2.0},
    {"top_p": 1},
    {"top_p": 1e-6},
    {"top_k": -1},
    {"top_k": 0},
    {"top_k": 10**6},
    {"min_p": 0},
    {"min_p": 1},
    {"seed": 0},
    {"max_tokens": None},
    {"max_tokens": None, "min_tokens": 100},
    {"max_tokens": 4, "min_tokens": 4},
    {"logprobs": 0},
    {"logprobs": 20},
    {"logprobs": -1},
    {"prompt_logprobs": -1},
    {"stop": "x"},
    {"stop": ["x", "y"]},
    {"stop": [], "detokenize": False},
    {"stop_token_ids": [1, 2]},
    {"bad_words": ["x"]},
    {"allowed_token_ids": [1]},
    {"n": 2, "temperature": 1e-5},
    {"top_k": np.int64(3), "top_p": np.float32(0.5), "stop_token_ids": np.arange(3)},
    {"logit_bias": {3: -100, 4: -1e30}},
]

REFUSED = [
    ({"n": 0}, "n must be an integer from 1 to 16384, got 0"),
    ({"n": 2**31}, "got 2147483648"),
    ({"n": 1.5}, "got 1.5"),
    ({"n": True}, "got True"),
    ({"presence_penalty": 2.1}, r"presence_penalty must be in \[-2, 2\], got 2.1"),
    ({"frequency_penalty": -2.1}, r"frequency_penalty must be in \[-2, 2\]"),
    ({"repetition_penalty": 0}, r"repetition_penalty must be in \[0.001, 1000\], got 0"),
    ({"repetition_penalty": float("inf")}, "got inf"),
    ({"repetition_penalty": 1e-300}, "got 1e-300"),
    ({"repetition_penalty": None}, "got None"),
    ({"temperature": -0.1}, r"temperature must be in \[0, 2\]"),
    ({"temperature": 2.1}, "got 2.1"),
    ({"temperature": float("nan")}, "got nan"),
    ({"temperature": "hot"}, "got 'hot'"),
    ({"top_p": 0}, r"top_p must be in \(0, 1\]"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -2}, "top_k must be an integer of at least -1"),
    ({"top_k": 2.5}, "got 2.5"),
    ({"min_p": -0.1}, r"min_p must be in \[0, 1\]"),
    ({"min_p": 1.1}, "min_p"),
    ({"seed": 1.5}, "seed must be an integer or None"),
    ({"max_tokens": 0}, "max_tokens must be at least 1, or None"),
    ({"min_tokens": -1}, "min_tokens must be at least 0"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens=5 is above max_tokens=4"),
    ({"logprobs": -2}, "logprobs must be from 0 to 20"),
    ({"logprobs": 21}, "got 21"),
    ({"prompt_logprobs": 21}, "prompt_logprobs must be"),
    ({"stop": ""}, "stop must be non-empty strings"),
    ({"stop": ["x", ""]}, "stop must be"),
    ({"stop": [3]}, "got 3"),
    ({"stop": "x", "detokenize": False}, "needs detokenize=True"),
    ({"bad_words": [""]}, "bad_words must be non-empty strings"),
    ({"allowed_token_ids": []}, "allows no token at all"),
    ({"n": 2, "temperature": 0}, "n=2 completions of temperature=0 are all the same"),
    ({"n": 2, "temperature": 0.9e-5}, "n=2"),
    ({"stop_token_ids": ["x"]}, "stop_token_ids must be token ids"),
    ({"allowed_token_ids": [1.5]}, "allowed_token_ids must be token ids"),
    ({"logit_bias": {"5": 1.0}}, "logit_bias must be token ids"),
    ({"logit_bias": {5: "x"}}, "logit_bias must be numbers"),
    ({"stop": 5}, "stop must be non-empty strings"),
    ({"logit_bias": [1, 2]}, r"logit_bias must be a mapping of token ids to numbers, got \[1, 2\]"),
    ({"allowed_token_ids": "5"}, "allowed_token_ids must be token ids, got '5'"),
    ({"allowed_token_ids": iter(())}, "allows no token at all"),
    ({"allowed_token_ids": np.zeros((2, 2), int)}, r"allowed_token_ids must be token ids, got \[0, 0\]"),
    ({"bad_words": ["a\ud800"]}, r"bad_words must be texts without half of a surrogate pair, got 'a\\ud800'"),
    ({"stop": "\udfff"}, "stop must be texts without half of a surrogate pair"),
]


def test_names_and_defaults():
    assert [field.name for field in dataclasses.fields(SamplingParams)] == list(DEFAULTS)
    params = SamplingParams()
    for name, value in DEFAULTS.items():
        assert getattr(params, name) == (() if name in ("stop", "stop_token_ids", "bad_words") else value)


@pytest.mark.parametrize("given", ALLOWED, ids=str)
def test_allowed(given):
    SamplingParams(**given)


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**given)


def test_errors_are_value_errors():
    with pytest.raises(ValueError, match="top_p"):
        SamplingParams(top_p=2)


def test_unknown_names_are_refused():
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)


def test_texts_and_ids_become_tuples():
    params = SamplingParams(stop="x", stop_token_ids=[1], bad_words=["y"])
    assert (params.stop, params.stop_token_ids, params.bad_words) == (("x",), (1,), ("y",))


@pytest.mark.parametrize("name", ["allowed_token_ids", "stop_token_ids"])
def test_ids_in_any_form(name):
    for given in ([5, 6], np.array([5, 6]), torch.tensor([5, 6]), iter([5, 6]), (i for i in (5, 6))):
        assert getattr(SamplingParams(**{name: given}), name) == (5, 6)
    for given in (5, np.int64(5), np.array(5), torch.tensor(5), [np.int64(5)]):
        assert getattr(SamplingParams(**{name: given}), name) == (5,)


def test_a_logit_bias_is_copied():
    given = {5: 1.0}
    params = SamplingParams(logit_bias=given)
    given[6] = "x"
    assert params.logit_bias == {5: 1.0}


def test_greedy_below_1e_5():
    assert SamplingParams(temperature=0.99e-5).greedy
    assert not SamplingParams(temperature=1e-5).greedy


def test_frozen_and_copied():
    params = SamplingParams(temperature=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 1.0
    assert params.clone() == params
    assert params.replace(top_k=3) == SamplingParams(temperature=0.5, top_k=3)
    with pytest.raises(ConfigError):
        params.replace(top_k=-7)
