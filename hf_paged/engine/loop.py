"""The loop over an engine: read messages, step, report."""

from __future__ import annotations

from typing import Protocol

from hf_paged.engine.engine import Engine


class Mailbox(Protocol):
    """Where a loop gets its messages, and where it reports."""

    def read(self) -> bool:
        """Carry out the messages that are there. False: the loop ends."""

    def landed(self) -> None:
        """Called once a round: after the messages, and a step where there was one to make."""


def drive(engine: Engine, mailbox: Mailbox) -> None:
    """Step an engine between messages until its mailbox ends the loop: an owner thread's, and an engine process's."""
    while mailbox.read():
        if engine.has_work:
            engine.step()
        mailbox.landed()
