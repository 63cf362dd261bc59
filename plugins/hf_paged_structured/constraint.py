"""GrammarConstraint: where one request is in its grammar, and the tokens that may follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from llguidance import LLExecutor, LLMatcher

from hf_paged import InvalidRequestError
from hf_paged.types import Request

if TYPE_CHECKING:
    from hf_paged_structured.ahead import Ahead


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
        """See `Constraint.advance`."""
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
