"""Grammars compiled for a tokenizer, each once."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from copy import copy
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from hf_paged import ConfigError, InvalidRequestError, StructuredOutputs
from hf_paged.types import Request
from hf_paged_structured.constraint import GrammarConstraint
from hf_paged_structured.grammar import LIMITS, grammar_of, kind_of, refused

_MOST_GRAMMARS = 256  # kept for each tokenizer; a compiled grammar takes from some KB to a few MB


def constraint_for(request: Request, tokenizer: Any) -> GrammarConstraint:
    """A constraint for a request that has structured outputs.

    Raises:
        ConfigError: there is no fast tokenizer.
        InvalidRequestError: the grammar is wrong or too large, or nothing could end the output.
    """
    wanted = request.params.structured_outputs
    assert isinstance(wanted, StructuredOutputs)  # the hook is called for such requests only
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        found = "there is none" if tokenizer is None else f"{type(tokenizer).__name__} is none"
        raise ConfigError(f"structured_outputs needs a fast tokenizer (of the library tokenizers); {found}")
    kind, grammar = kind_of(wanted), grammar_of(wanted)
    # A model without an end of sequence is ended by what the caller named.
    ends = tuple(sorted(request.eos_token_ids or request.params.stop_token_ids or ()))
    compiler = _compiler(tokenizer)
    matcher = compiler.matcher(kind, grammar, ends)
    return GrammarConstraint(matcher, kind, compiler.vocabulary)


class _Compiler:
    """The grammars of one tokenizer. May be used from several threads.

    Attributes:
        size: tokens that the tokenizer has.
        vocabulary: its largest id and one.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = copy(tokenizer.backend_tokenizer)
        backend.no_padding()
        backend.no_truncation()
        self.size = len(tokenizer)
        self.vocabulary = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self._definition = backend.to_str()
        self._lock = threading.Lock()
        self._tokenizers: dict[tuple[int, ...], LLTokenizer] = {}
        self._matchers: OrderedDict[tuple[str, tuple[int, ...]], LLMatcher] = OrderedDict()

    def matcher(self, kind: str, grammar: str, ends: tuple[int, ...]) -> LLMatcher:
        """A matcher of its own, at the start of the grammar."""
        key = (grammar, ends)
        with self._lock:
            found = self._matchers.get(key)
            if found is not None:
                self._matchers.move_to_end(key)
                return found.deep_copy()
            tokenizer = self._tokenizer(ends)
        made = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
        if made.is_error():
            raise refused(kind, made.get_error())
        with self._lock:
            self._matchers[key] = made
            while len(self._matchers) > _MOST_GRAMMARS:
                self._matchers.popitem(last=False)
        return made.deep_copy()

    def _tokenizer(self, ends: tuple[int, ...]) -> LLTokenizer:
        known = [token for token in ends if 0 <= token < self.vocabulary]  # configs name ids that tokenizers don't have
        if not known:
            raise InvalidRequestError(
                f"structured_outputs needs an end-of-sequence id that the tokenizer knows; the request has {list(ends)}"
            )
        if ends not in self._tokenizers:
            try:
                self._tokenizers[ends] = LLTokenizer(self._definition, eos_token=known)
            except ValueError as error:
                raise ConfigError(f"structured_outputs can't be kept to with this tokenizer: {error}") from error
        return self._tokenizers[ends]


_compilers: weakref.WeakKeyDictionary[Any, _Compiler] = weakref.WeakKeyDictionary()
_guard = threading.Lock()


def _compiler(tokenizer: Any) -> _Compiler:
    """The compiler of a tokenizer; another one once tokens were added to it."""
    with _guard:
        found = _compilers.get(tokenizer)
        if found is None or found.size != len(tokenizer):
            found = _compilers[tokenizer] = _Compiler(tokenizer)
        return found
