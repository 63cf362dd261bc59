"""The fields of a call -> SamplingParams."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Mapping
from typing import Any, Protocol

from hf_paged.errors import ConfigError
from hf_paged.params import SamplingParams
from hf_paged.params import StructuredOutputs as Constraint
from hf_paged.server.errors import LONGEST, APIError, invalid
from hf_paged.server.messages import Ready
from hf_paged.server.protocol.common import Sampled, Shared

# Fields that mean the same in a call and in SamplingParams: those of the same name, but for these.
_FIELDS = {*SamplingParams.__dataclass_fields__} - {"logit_bias", "logprobs", "max_tokens", "structured_outputs"}
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
    given: dict[str, Any] = dict(ready.defaults)
    given |= {name: value for name in _FIELDS if (value := getattr(body, name, None)) is not None}
    given |= {"max_tokens": max_tokens, "logprobs": logprobs, "structured_outputs": shape and shape.constraint}
    if isinstance(body, Sampled):
        given["logit_bias"] = _bias(body)
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


class Asks(Protocol):
    """A field of a call that may ask for a constraint."""

    def constraint(self) -> Mapping[str, Any] | None:
        """The field of StructuredOutputs that asks for it, and its value; None: any text will do."""


def shape_of(ready: Ready, asked: Mapping[str, Asks | None]) -> Shape | None:
    """What the answer of a call has to be like, or None.

    Args:
        ready: of the engine.
        asked: the fields by name. `tool_choice` asks for what `tools` say.

    Raises:
        APIError: 400, two fields ask for something, or no plugin handles it.
    """
    given = [(param, found) for param, one in asked.items() if one and (found := one.constraint()) is not None]
    if not given:
        return None
    param, constraint = given[0]
    if len(given) > 1:
        raise invalid(f"{param} and {given[1][0]} both shape the answer; give one", param)
    if not ready.structured:
        raise invalid(f"{param} needs a structured-output plugin, and none is loaded", param)
    return Shape("tools" if param == "tool_choice" else param, constraint)


def _bias(body: Sampled) -> dict[int, float] | None:
    if not body.logit_bias:
        return None
    wrong = [token for token in body.logit_bias if not re.fullmatch(r"\d{1,10}", token, re.ASCII)]
    if wrong:
        raise invalid(f"logit_bias has the key {wrong[0]!r}; keys are token ids", "logit_bias")
    return {int(token): float(bias) for token, bias in body.logit_bias.items()}
