"""Masks computed ahead of time: in a thread, from the moment a token is known."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from llguidance import LLExecutor

from hf_paged_structured.constraint import GrammarConstraint, fill


class Ahead:
    """Computes what it is asked for in the order of asking, as many at a time as have come in.

    The engine's thread asks and waits; the thread here works. A request's mask is asked for when its token is known, so
    it is computed while the engine sees to the other requests, schedules the next step and runs its forward.
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
            except BaseException as error:  # whatever it is: nobody may wait for ever
                for constraint in batch:
                    constraint.error = RuntimeError(f"no mask could be computed: {error}")
            with self._changed:
                for constraint in batch:
                    constraint.pending = False
                self._changed.notify_all()
