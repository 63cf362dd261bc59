"""Grammars compiled for a tokenizer, each once."""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from copy import copy
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from hf_paged import ConfigError, InvalidRequestError, StructuredOutputs
from hf_paged.request import Request
from hf_paged_structured.constraint import GrammarConstraint
from hf_paged_structured.grammar import LIMITS, grammar_of, kind_of, refused
from hf_paged_structured.trial import Trials

_MOST_GRAMMARS = 256  # kept for each tokenizer; a compiled grammar takes from some KB to a few MB
_LONGEST = 2**20  # characters
_HARMLESS = 1000  # characters in which no grammar overflows a stack


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
        self._known: dict[tuple[int, ...], tuple[LLTokenizer, Trials]] = {}
        # What came of each grammar: a matcher at its start, or what is wrong with it.
        self._found: OrderedDict[bytes, Future[LLMatcher | str]] = OrderedDict()

    def matcher(self, kind: str, grammar: str, ends: tuple[int, ...]) -> LLMatcher:
        """A matcher of its own, at the start of the grammar.

        Raises:
            InvalidRequestError: the grammar can't be compiled. It isn't tried again for other requests.
        """
        with self._lock:
            tokenizer, trials = self._for(ends)
        key = hashlib.sha256(f"{ends}{grammar}".encode()).digest()
        found = self._once(key, lambda: _compiled(grammar, tokenizer, trials))
        if isinstance(found, str):
            raise refused(kind, found)
        return found.deep_copy()

    def _once(self, key: bytes, work: Callable[[], LLMatcher | str]) -> LLMatcher | str:
        """The result of `work` for a key, done by the first that asks; others wait for it."""
        with self._lock:
            known = self._found.get(key)
            future = self._found[key] = known or Future()
            self._found.move_to_end(key)
            if len(self._found) > _MOST_GRAMMARS:
                self._found.popitem(last=False)
        if known is None:
            try:
                future.set_result(work())
            except BaseException as error:  # of this try, and no property of the grammar
                with self._lock:
                    self._found.pop(key, None)
                future.set_exception(error)
        return future.result()

    def _for(self, ends: tuple[int, ...]) -> tuple[LLTokenizer, Trials]:
        known = [token for token in ends if 0 <= token < self.vocabulary]  # configs name ids that tokenizers don't have
        if not known:
            raise InvalidRequestError(
                f"structured_outputs needs an end-of-sequence id that the tokenizer knows; the request has {list(ends)}"
            )
        if ends not in self._known:
            try:
                tokenizer = LLTokenizer(self._definition, eos_token=known)
            except ValueError as error:
                raise ConfigError(f"structured_outputs can't be kept to with this tokenizer: {error}") from error
            self._known[ends] = tokenizer, Trials(self._definition, known)
        return self._known[ends]


def _compiled(grammar: str, tokenizer: LLTokenizer, trials: Trials) -> LLMatcher | str:
    """A matcher at the grammar's start, or what is wrong with it; a long one is tried in another process first."""
    if len(grammar) > _LONGEST:
        return f"it has {len(grammar)} characters, and {_LONGEST} are allowed"
    problem = trials.problem_of(grammar) if len(grammar) > _HARMLESS and os.name == "posix" else None
    if problem is not None:
        return problem
    made = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    return made.get_error() if made.is_error() else made


_compilers: weakref.WeakKeyDictionary[Any, _Compiler] = weakref.WeakKeyDictionary()
_guard = threading.Lock()


def _compiler(tokenizer: Any) -> _Compiler:
    """The compiler of a tokenizer; another one once tokens were added to it."""
    with _guard:
        found = _compilers.get(tokenizer)
        if found is None or found.size != len(tokenizer):
            found = _compilers[tokenizer] = _Compiler(tokenizer)
        return found
