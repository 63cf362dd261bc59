"""The fields of a call -> SamplingParams."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Mapping
from typing import Any

from hf_paged.errors import ConfigError
from hf_paged.params import SamplingParams
from hf_paged.params import StructuredOutputs as Constraint
from hf_paged.server.errors import LONGEST, APIError, invalid
from hf_paged.server.messages import Ready
from hf_paged.server.protocol.common import ResponseFormat, Sampled, Shared, StructuredOutputs

# Fields that mean the same in a call and in SamplingParams, and that the model's defaults may set.
_DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_SAME = (
    *("stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens", "skip_special_tokens"),
    *("spaces_between_special_tokens", "allowed_token_ids", "bad_words", "seed"),
)
_OPTIONAL = ("presence_penalty", "frequency_penalty", "stop", "prompt_logprobs")
_SHAPES = {"structured_outputs", *Constraint.__dataclass_fields__}


@dataclasses.dataclass(frozen=True)
class Shape:
    """What an output has to be like.

    Attributes:
        param: the field of the call that asks for it.
        constraint: the field of StructuredOutputs that it is, and its value.
    """

    param: str
    constraint: Mapping[str, Any]


def sampling_params(
    body: Shared,
    ready: Ready,
    *,
    seeds: random.Random,
    max_tokens: int,
    logprobs: int | None = None,
    shape: Shape | None = None,
) -> SamplingParams:
    """The parameters of a call, over the defaults of the model's generation config.

    A sampled call without a seed gets one of `seeds`, so that it goes on exactly where it was after an engine died.

    Raises:
        APIError: 400, a value is out of range, or contradicts another.
    """
    given: dict[str, Any] = {name: value for name, value in ready.defaults.items() if name in _DEFAULTED}
    given |= {name: getattr(body, name) for name in _DEFAULTED if getattr(body, name) is not None}
    given |= {name: getattr(body, name) for name in _SAME}
    if isinstance(body, Sampled):
        given |= {name: getattr(body, name) for name in _OPTIONAL if getattr(body, name) is not None}
        given |= {"n": body.n or 1, "logit_bias": _bias(body)}
    given |= {"max_tokens": max_tokens, "logprobs": logprobs}
    given |= {"structured_outputs": shape and shape.constraint}
    try:
        params = SamplingParams(**given)
    except ConfigError as error:
        raise refusal(str(error), body, shape) from error
    if params.seed is None and not params.greedy:
        params = params.replace(seed=seeds.getrandbits(48))
    return params


def refusal(message: str, body: Shared, shape: Shape | None) -> APIError:
    """The 400 for what SamplingParams or the engine refuses, under the name of the field that the client gave."""
    words = re.findall(r"[a-z_]+", message[:LONGEST])
    fields = SamplingParams.__dataclass_fields__
    named = (
        word for word in words if (word in fields and word in body.model_fields_set) or (shape and word in _SHAPES)
    )
    param = next(named, words[0] if words and words[0] in fields else None)
    if shape is None:
        return invalid(message, param)
    if shape.param != "structured_outputs":
        message = re.sub(r"structured_outputs(\.\w+)?", shape.param, message, count=1)
    return invalid(message, shape.param if param in _SHAPES else param)


def shape_of(form: ResponseFormat | None, given: StructuredOutputs | None, ready: Ready) -> Shape | None:
    """What `response_format` or `structured_outputs` asks for, or None.

    Raises:
        APIError: 400, both ask for something, or no plugin sees to it.
    """
    found: dict[str, Any] | None = None
    if form is not None and form.type == "json_object":
        found = {"json_object": True}
    elif form is not None and form.type == "json_schema":
        if form.json_schema is None:
            raise invalid("response_format of the type 'json_schema' needs json_schema", "response_format.json_schema")
        found = {"json": form.json_schema.schema_ if form.json_schema.schema_ is not None else {}}
    if given is not None:
        if found is not None:
            raise invalid(
                "response_format and structured_outputs both shape the answer; give one", "structured_outputs"
            )
        found = given.constraint()
    if found is None:
        return None
    param = "response_format" if given is None else "structured_outputs"
    if not ready.structured:
        raise needs_structured(param)
    return Shape(param, found)


def needs_structured(param: str) -> APIError:
    """The 400 for what can't be had without a structured-output plugin."""
    return invalid(f"{param} needs a structured-output plugin, and none is loaded", param)


def _bias(body: Sampled) -> dict[int, float] | None:
    if not body.logit_bias:
        return None
    wrong = [token for token in body.logit_bias if not re.fullmatch(r"\d{1,10}", token, re.ASCII)]
    if wrong:
        raise invalid(f"logit_bias has the key {wrong[0]!r}; keys are token ids", "logit_bias")
    return {int(token): float(bias) for token, bias in body.logit_bias.items()}
