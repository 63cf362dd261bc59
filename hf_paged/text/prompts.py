"""Prompts as `LLM.generate` takes them -> their token ids."""

from __future__ import annotations

import dataclasses
import numbers
import operator
from collections.abc import Iterable, Mapping
from typing import Any

from hf_paged.errors import ConfigError, InvalidRequestError
from hf_paged.params import LONE_SURROGATE

KEYS = ("prompt", "prompt_token_ids", "cache_salt")  # of a prompt dict


@dataclasses.dataclass(frozen=True)
class ReadPrompt:
    """A prompt that was read.

    Attributes:
        ids: its tokens.
        text: as it was given, or None: only ids were.
        cache_salt: only prompts of the same salt share blocks of the prefix cache; None is one of them.
    """

    ids: list[int]
    text: str | None = None
    cache_salt: str | None = None


def as_list(prompts: Any) -> list[Any]:
    """One prompt or several as a list of prompts. An array of numpy or torch is what its `tolist()` is.

    Raises:
        InvalidRequestError: they are none.
    """
    if isinstance(prompts, (str, bytes, Mapping)):
        return [prompts]
    found = _listed(prompts)
    if found is None:
        raise InvalidRequestError(f"prompts are texts, lists of token ids or dicts, one or many, got {prompts!r:.80}")
    return [found] if found and _is_number(found[0]) else found


def read_prompt(prompt: Any, tokenizer: Any) -> ReadPrompt:
    """A prompt's ids, with its text if it has one. Where a dict has both, its ids count, and its text is only kept.

    Args:
        prompt: a text, ids, or a dict with KEYS, in which None means that a key is absent.
        tokenizer: None: only ids can be read.

    Raises:
        InvalidRequestError: it is no prompt; the message names the key.
        ConfigError: a text without a tokenizer.
    """
    if isinstance(prompt, str):
        return ReadPrompt(_encoded(prompt, tokenizer), prompt)
    if not isinstance(prompt, Mapping):
        return ReadPrompt(_ids(prompt))
    for key, value in prompt.items():
        if key not in KEYS and value is not None:
            raise InvalidRequestError(
                f"the key {key!r} of a prompt dict is not supported; it may have {', '.join(KEYS)}. "
                "Inputs other than text and token ids go through model.generate()"
            )
    text, ids, salt = (prompt.get(key) for key in KEYS)
    if text is None and ids is None:
        raise InvalidRequestError(
            f"a prompt dict needs 'prompt' or 'prompt_token_ids'; it has {sorted(map(str, prompt))}"
        )
    if salt is not None and not (isinstance(salt, str) and salt):
        raise InvalidRequestError(f"cache_salt must be a text that isn't empty, or None, got {salt!r:.80}")
    if text is not None and not isinstance(text, str):
        if ids is not None:
            raise InvalidRequestError(f"prompt must be a text beside prompt_token_ids, got {text!r:.80}")
        text, ids = None, text
    return ReadPrompt(_encoded(text, tokenizer) if ids is None else _ids(ids), text, salt)


def check_text(text: str) -> None:
    """Refuse a text that tokenizers don't take.

    Raises:
        InvalidRequestError: it holds half of a surrogate pair; the message says where.
    """
    if found := LONE_SURROGATE.search(text):
        raise InvalidRequestError(
            f"the text has half of a surrogate pair, {found[0]!r}, at character {found.start()}; give Unicode, such as "
            "text.encode('utf-8', 'replace').decode()"
        )


def _encoded(text: Any, tokenizer: Any) -> list[int]:
    if tokenizer is None:
        raise ConfigError("a text prompt needs a tokenizer; give LLM(tokenizer=...), or token ids")
    check_text(text)
    return list(tokenizer.encode(text))


def _ids(value: Any) -> list[int]:
    tokens = _listed(value)
    try:
        if tokens is not None:
            return [operator.index(token) for token in tokens]
    except TypeError:
        pass
    raise InvalidRequestError(f"a prompt is a text or a list of token ids, got {value!r:.80}")


def _listed(value: Any) -> list[Any] | None:
    """The values of something ordered, or None: it is nothing of the kind."""
    if hasattr(value, "tolist"):  # an array, or a scalar, of numpy or torch
        value = value.tolist()
    ordered = isinstance(value, Iterable) and not isinstance(value, (str, bytes, bytearray, Mapping, set, frozenset))
    return list(value) if ordered else None


def _is_number(value: Any) -> bool:
    """Whether it is an integer, of numpy or torch too."""
    return isinstance(value, numbers.Integral) or (hasattr(value, "__index__") and getattr(value, "ndim", 1) == 0)
