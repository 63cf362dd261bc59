"""GrammarConstraint: where one request is in its grammar, and the tokens that may follow.

Ahead computes these masks ahead of time: in a thread, from the moment a token is known.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from llguidance import LLExecutor, LLMatcher

from hf_paged import InvalidRequestError
from hf_paged.request import Request


class GrammarConstraint:
    """Keeps a request to its grammar. The engine's thread alone calls it; masks are filled in by `fill`.

    Args:
        matcher: at the start of the grammar.
        kind: the field of StructuredOutputs that it came from.
        vocabulary: ids of the tokenizer.

    Attributes:
        words: entries of a mask: (vocabulary + 31) // 32.
        matcher: where the output is in the grammar.
        mask: int32 [words], the tokens that may follow, lowest bit first; None: not computed yet.
        pending: whether a thread has it to compute.
        error: why no mask can be computed; ends the request at its next token.
        ahead: who computes masks ahead of time; the processor that meets the request first sets it.
    """

    def __init__(self, matcher: LLMatcher, kind: str, vocabulary: int) -> None:
        self.words = (vocabulary + 31) // 32
        self.matcher = matcher
        self.mask: np.ndarray | None = None
        self.pending = False
        self.error: Exception | None = None
        self.ahead: Ahead | None = None
        self._kind = kind
        self._consumed = 0

    def advance(self, request: Request) -> bool:
        self.catch_up(request)
        if self.error is not None:
            raise self.error
        complete = self.matcher.is_stopped()
        if not complete and self.mask is None and not self.pending and self.ahead is not None:
            self.ahead.ask(self)
        return complete

    def catch_up(self, request: Request) -> None:
        """Take in the tokens that the request has by now; one that resumes begins with several."""
        start = len(request.prompt_token_ids) + self._consumed
        new = request.token_ids[start:]
        if not new or self.error is not None:
            return
        if self.pending and self.ahead is not None:
            self.ahead.wait_for([self])
        self.mask = None
        self._consumed += len(new)
        if not self.matcher.consume_tokens(new):
            self.error = self._failed("its output holds a token that it doesn't allow")

    def failed_to_compute(self) -> None:
        """No mask could be computed: any token may follow, and the request ends with it."""
        self.error = self._failed("the output became too complex for the parser")

    def _failed(self, why: str) -> InvalidRequestError:
        problem = " ".join(self.matcher.get_error().split())
        return InvalidRequestError(f"structured_outputs.{self._kind} can't be kept to: {why} ({problem})")


class Ahead:
    """Computes what it is asked for in the order of asking, as many at a time as have come in.

    The engine's thread asks and waits; the thread here works. A request's mask is asked for when its token is known, so
    it is computed while the engine handles the other requests, schedules the next step and runs its forward.
    """

    def __init__(self) -> None:
        self._executor = LLExecutor()
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hf_paged_structured")
        self._changed = threading.Condition()
        self._asked: list[GrammarConstraint] = []
        self._working = False

    def ask(self, constraint: GrammarConstraint) -> None:
        """Have a constraint's mask computed."""
        with self._changed:
            constraint.pending = True
            self._asked.append(constraint)
            if self._working:
                return
            self._working = True
        try:
            self._threads.submit(self._work)
        except RuntimeError:  # the interpreter is shutting down: what was asked for is computed when it is needed
            with self._changed:
                for asked in self._asked:
                    asked.pending = False
                self._asked, self._working = [], False

    def wait_for(self, constraints: Sequence[GrammarConstraint]) -> None:
        """Wait until the masks that were asked for are there."""
        with self._changed:
            self._changed.wait_for(lambda: not any(constraint.pending for constraint in constraints))

    def compute(self, constraints: Sequence[GrammarConstraint]) -> None:
        """Compute masks here and now."""
        if constraints:
            fill(self._executor, constraints)

    def _work(self) -> None:
        while True:
            with self._changed:
                batch, self._asked = self._asked, []
                if not batch:
                    self._working = False
                    return
            try:
                self.compute(batch)
            except BaseException as error:  # of any kind: `wait_for` has to return
                for constraint in batch:
                    constraint.error = RuntimeError(f"no mask could be computed: {error}")
            with self._changed:
                for constraint in batch:
                    constraint.pending = False
                self._changed.notify_all()


def fill(executor: LLExecutor, constraints: Sequence[GrammarConstraint]) -> None:
    """Compute the masks of constraints, side by side on the CPU's cores; the interpreter is not held meanwhile.

    A constraint whose mask can't be computed has an error then, and the others their masks.
    """
    words = max(constraint.words for constraint in constraints)
    masks = np.empty((len(constraints), words), dtype=np.int32)
    matchers = [(constraint.matcher, row) for row, constraint in enumerate(constraints)]
    try:
        executor.unsafe_compute_mask_ptr(matchers, masks.ctypes.data, words * 4, len(constraints))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        if len(constraints) == 1:
            constraints[0].error = RuntimeError(f"llguidance failed: {error}")
        else:
            for constraint in constraints:
                fill(executor, [constraint])
        return
    for constraint, mask in zip(constraints, masks, strict=True):
        if constraint.matcher.is_error():
            constraint.failed_to_compute()
        else:
            constraint.mask = mask
