"""SamplingParams: how one request turns logits into tokens, under the names of vLLM's offline API."""

from __future__ import annotations

import dataclasses
import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hf_paged.errors import ConfigError

GREEDY_TEMPERATURE = 1e-5
MAX_LOGPROBS = 20
MAX_N = 16384  # completions of one prompt: vLLM's limit
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # half of a surrogate pair: tokenizers take none
MAX_BIAS = 1e30  # a float32 logit stays finite with it, divided by the least penalty and temperature too


@dataclasses.dataclass(frozen=True, kw_only=True)
class StructuredOutputs:
    """What an output has to be like. Exactly one of these is set.

    Attributes:
        json: a JSON schema, as a mapping or as its text.
        regex: a regular expression that the whole output matches.
        choice: texts; the output is one of them.
        grammar: a context-free grammar, in a syntax that the structured-output plugin takes.
        json_object: True: any JSON object.

    Raises:
        ConfigError: none or several are set, or one is of the wrong type.
    """

    json: Mapping[str, Any] | str | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        chosen = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) not in (None, False)]
        if len(chosen) != 1:
            names = ", ".join(field.name for field in dataclasses.fields(self))
            raise ConfigError(f"structured_outputs takes exactly one of {names}; got {', '.join(chosen) or 'none'}")
        _require("json", self.json, self.json is None or isinstance(self.json, (str, Mapping)), "a schema or its text")
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            _require(name, value, value is None or (isinstance(value, str) and bool(value)), "a text that isn't empty")
        if self.choice is not None:
            good = not isinstance(self.choice, str) and isinstance(self.choice, Sequence) and bool(self.choice)
            good = good and all(isinstance(text, str) for text in self.choice)
            _require("choice", self.choice, good, "a list of at least one text")
            object.__setattr__(self, "choice", tuple(self.choice))
        _require("json_object", self.json_object, self.json_object in (None, True, False), "True or False")


StructuredOutputsParams = StructuredOutputs  # vLLM's name for it


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The sampling parameters of one request. Validated when built; defaults are vLLM's.

    Attributes:
        n: how many completions of the prompt, at most 16384; they share the prompt's KV blocks.
        presence_penalty: taken once from the logit of each token that the output holds; [-2, 2].
        frequency_penalty: taken from it as often as the output holds the token; [-2, 2].
        repetition_penalty: divides positive and multiplies negative logits of the prompt's and the output's tokens;
            [0.001, 1000].
        temperature: [0, 2]; below 1e-5 the most likely token is taken.
        top_p: the smallest set of tokens whose probability reaches it is kept; (0, 1].
        top_k: the k most likely tokens are kept; 0 and -1 keep all.
        min_p: tokens below `min_p` times the largest probability are dropped; [0, 1].
        seed: makes the draws of this request its own, whatever batch it lands in; completion i uses seed + i.
        stop: strings that end the output; they are cut off unless `include_stop_str_in_output`.
        stop_token_ids: ids that end the output, beside the model's end-of-sequence ids.
        ignore_eos: go on after an end-of-sequence id.
        max_tokens: most new tokens, or None: up to the model's length.
        min_tokens: no stop id or end-of-sequence before that many new tokens.
        logprobs: how many of the most likely tokens to report for each output token (-1: all), of the raw distribution.
        prompt_logprobs: the same for each prompt token.
        detokenize: build text; without it only ids come back.
        skip_special_tokens, spaces_between_special_tokens: as the tokenizer's `decode` has them.
        include_stop_str_in_output: keep the stop string at the end of the text.
        structured_outputs: what the output has to be like: a StructuredOutputs, or a mapping of its fields. A plugin
            enforces it; refused where none does.
        logit_bias: added to the logits of these ids; each is finite, within ±1e30.
        allowed_token_ids: only these may be drawn.
        bad_words: texts that must not be produced.
        extra_args: handed to plugins as it is.

    Raises:
        ConfigError: a value is out of range; the message names the value and the range.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputs | Mapping[str, Any] | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    extra_args: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids", "bad_words"):
            # A frozen instance can only be normalised past its own guard.
            object.__setattr__(self, name, _as_tuple(getattr(self, name)))
        if self.allowed_token_ids is not None:  # none is no empty list here
            object.__setattr__(self, "allowed_token_ids", _as_tuple(self.allowed_token_ids))
        if self.logit_bias is not None:
            is_mapping = isinstance(self.logit_bias, Mapping)
            _require("logit_bias", self.logit_bias, is_mapping, "a mapping of token ids to numbers")
            object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        object.__setattr__(self, "structured_outputs", _structured(self.structured_outputs))
        self._check_ranges()
        self._check_texts()
        self._check_together()

    def _check_ranges(self) -> None:
        _require("n", self.n, _at_least(self.n, 1) and self.n <= MAX_N, f"an integer from 1 to {MAX_N}")
        for name in ("presence_penalty", "frequency_penalty"):
            _require(name, getattr(self, name), _between(getattr(self, name), -2.0, 2.0), "in [-2, 2]")
        _require(
            "repetition_penalty",
            self.repetition_penalty,
            _between(self.repetition_penalty, 1e-3, 1e3),
            "in [0.001, 1000]",
        )
        _require("temperature", self.temperature, _between(self.temperature, 0.0, 2.0), "in [0, 2]")
        _require("top_p", self.top_p, 0.0 < _number(self.top_p) <= 1.0, "in (0, 1]")
        _require("top_k", self.top_k, _at_least(self.top_k, -1), "an integer of at least -1 (0, -1: off)")
        _require("min_p", self.min_p, _between(self.min_p, 0.0, 1.0), "in [0, 1]")
        if self.seed is not None:
            _require("seed", self.seed, is_integer(self.seed), "an integer or None")
        if self.max_tokens is not None:
            _require("max_tokens", self.max_tokens, _at_least(self.max_tokens, 1), "at least 1, or None")
        _require("min_tokens", self.min_tokens, _at_least(self.min_tokens, 0), "at least 0")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                ok = _at_least(value, -1) and value <= MAX_LOGPROBS
                _require(name, value, ok, f"from 0 to {MAX_LOGPROBS}, -1 for all, or None")

    def _check_texts(self) -> None:
        for name in ("stop", "bad_words"):
            for text in getattr(self, name):
                _require(name, text, isinstance(text, str) and bool(text), "non-empty strings")
                _require(name, text, not LONE_SURROGATE.search(text), "texts without half of a surrogate pair")
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for token in getattr(self, name) or ():
                _require(name, token, is_integer(token), "token ids")
        for bias in (self.logit_bias or {}).values():
            _require(
                "logit_bias", bias, _between(bias, -MAX_BIAS, MAX_BIAS), f"numbers in [-{MAX_BIAS:g}, {MAX_BIAS:g}]"
            )

    def _check_together(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ConfigError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}; lower it")
        if self.stop and not self.detokenize:
            raise ConfigError(f"stop={list(self.stop)!r} needs detokenize=True: strings are looked for in the text")
        if self.greedy and self.n > 1:
            raise ConfigError(
                f"n={self.n} completions of temperature={self.temperature} are all the same; raise the temperature"
            )
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ConfigError("allowed_token_ids=[] allows no token at all; give ids, or None for all of them")
        if self.structured_outputs is not None and self.ignore_eos:
            raise ConfigError("ignore_eos=True contradicts structured_outputs, which end where their grammar does")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < GREEDY_TEMPERATURE

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed; it is validated again."""
        return dataclasses.replace(self, **changes)

    clone = dataclasses.replace  # vLLM's name for a copy: params.clone()


def _structured(value: Any) -> StructuredOutputs | None:
    """Structured outputs as their own class, from a mapping of its fields too."""
    if value is None or isinstance(value, StructuredOutputs):
        return value
    _require("structured_outputs", value, isinstance(value, Mapping), "a StructuredOutputs or a mapping of its fields")
    known = {field.name for field in dataclasses.fields(StructuredOutputs)}
    if unknown := sorted(set(value) - known):
        raise ConfigError(f"structured_outputs has no {unknown[0]!r}; it has {', '.join(sorted(known))}")
    return StructuredOutputs(**value)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    """One or several values, an array of them, or None, as a tuple."""
    if value is None:
        return ()
    if not isinstance(value, Iterable) or hasattr(value, "ndim"):  # arrays, and their scalars, of numpy and torch
        value = value.tolist() if hasattr(value, "tolist") else value
    return (value,) if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)


def is_integer(value: object) -> bool:
    """Whether it is an integer, of numpy too, and no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _at_least(value: Any, low: int) -> bool:
    """Whether it is an integer, and not below `low`."""
    return is_integer(value) and value >= low


def _number(value: object) -> float:
    """The value as a float, or NaN, for which every comparison fails."""
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else float("nan")


def _between(value: object, low: float, high: float) -> bool:
    return low <= _number(value) <= high


def _require(name: str, value: object, ok: bool, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{name} must be {allowed}, got {value!r}")
