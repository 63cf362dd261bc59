"""Compiling a grammar in a process that may die of it, before the engine's own process does.

A grammar of a hundred kilobytes can overflow the native stack of its parser, which ends the process, or take a minute
and gigabytes. So one that is long is compiled here first: on a small stack, in bounded memory and time.

This file is also the program of those processes, which import nothing but llguidance. The first frame is the tokenizer
and the ids that end an output, as JSON. The others are grammars; the answer is what is wrong with one, or nothing.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

from hf_paged.disposable import Ended, Pool

SECONDS = 10.0  # that a grammar may take to compile
MEMORY = 4 * 2**30  # bytes of address space that it may take
STACK = 2**20  # bytes; a thread of the engine's process has eight times that
PROCESSES = 2  # grammars that are tried at a time


class Trials(Pool):
    """Processes that compile grammars for one tokenizer. May be used from several threads.

    Args:
        definition: the tokenizer's, as JSON.
        ends: ids that end an output.
    """

    def __init__(self, definition: str, ends: Sequence[int]) -> None:
        first = json.dumps({"definition": definition, "ends": list(ends)}).encode()
        super().__init__(__file__, first, memory=MEMORY, most=PROCESSES)

    def problem_of(self, grammar: str) -> str | None:
        """What keeps a grammar from being compiled, or None. Waits while others are tried.

        Raises:
            NotStarted: it can't be tried now.
        """
        try:
            return self.ask(grammar.encode(), SECONDS).decode() or None
        except Ended as ended:
            return _problem(ended.why)


def _problem(why: str) -> str:
    """What the end of a process tells of the grammar."""
    if why == "time":
        return f"it takes more than {SECONDS:g} s to compile"
    if why == "memory":
        return f"it takes more than {MEMORY / 2**30:g} GiB to compile"
    if why == "stack":
        return "it nests or chains its rules too deeply"
    return f"compiling it ended the process that tried it ({why})"


# ------------------------------------------------------------------------------------------------- inside the process


def answerer(first: bytes) -> Callable[[bytes], bytes]:
    """What tries grammars, each a frame; the first frame is the tokenizer's definition."""
    from llguidance import LLTokenizer

    given = json.loads(first)
    tokenizer = LLTokenizer(given["definition"], eos_token=given["ends"])
    return lambda grammar: _tried(tokenizer, grammar.decode()).encode()


def _tried(tokenizer: Any, grammar: str) -> str:
    from llguidance import LLMatcher, LLParserLimits

    found: list[str] = []

    def compile_it() -> None:
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
        found.append(matcher.get_error() if matcher.is_error() else "")

    threading.stack_size(STACK)
    thread = threading.Thread(target=compile_it)
    thread.start()
    thread.join()
    return found[0] if found else "the parser fails on it"
