"""Chat templates that calls bring, rendered in processes with limits.

Jinja's sandbox keeps a template from the server's files and objects, but neither from loops without an end nor from
texts of gigabytes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from hf_paged.disposable import Ended, NotStarted, Pool
from hf_paged.errors import ConfigError, InvalidRequestError
from hf_paged.server import heavy
from hf_paged.server.errors import APIError, invalid

logger = logging.getLogger(__name__)

PARAM = "chat_template"
SECONDS = 5.0  # limit on rendering one template
MEMORY = 2**30  # limit on the address space of a process, in bytes; a new process uses a sixth of it
CHARACTERS = 2**24  # limit on the length of the rendered text
PROCESSES = 2  # templates rendered at the same time
WAIT = 30.0  # seconds; a call that waited longer for a free process is refused
_PROGRAM = Path(__file__).with_name("template_program.py")


class RequestTemplates:
    """Renders the templates of calls as `templates.render` does. No process is started before the first one.

    Args:
        tokenizer: the model's. Templates get to see its special tokens. They are applied as Transformers does, even if
            the tokenizer's class has a way of its own.
    """

    def __init__(self, tokenizer: Any) -> None:
        first = {"special_tokens": dict(tokenizer.special_tokens_map), "most": CHARACTERS}
        self._processes = Pool(str(_PROGRAM), msgspec.msgpack.encode(first), memory=MEMORY, most=PROCESSES)
        self._threads = ThreadPoolExecutor(PROCESSES, thread_name_prefix="request-template")

    async def render(
        self, messages: Iterable[Mapping[str, Any]], *, tools: Iterable[Mapping[str, Any]] | None, **given: Any
    ) -> str:
        """What a template makes of a conversation. Cancelled, the process that renders it is killed.

        Args:
            messages, tools: gone through in a thread, so that a generator may be what makes them.
            given: further arguments of `templates.render`.

        Raises:
            ConfigError, InvalidRequestError: as by `templates.render`.
            APIError: 400, the template goes beyond a limit; 429, those of other calls take too long; 503, no process
                can be started.
        """
        cancelled = threading.Event()
        until = time.monotonic() + WAIT
        try:
            return await heavy.run(self._render, messages, tools, given, until, cancelled, threads=self._threads)
        finally:
            cancelled.set()

    def close(self) -> None:
        """End the threads. The processes end with this object, or with the server's process."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _render(
        self,
        messages: Iterable[Mapping[str, Any]],
        tools: Iterable[Mapping[str, Any]] | None,
        given: Mapping[str, Any],
        until: float,
        cancelled: threading.Event,
    ) -> str:
        if time.monotonic() > until:
            message = f"chat templates of other calls kept this one waiting for more than {WAIT:g} s; try again later"
            raise APIError(429, message, param=PARAM, code="queue_full", retry_after=2)
        call = {"messages": list(messages), "tools": None if tools is None else list(tools), **given}
        try:
            answer = self._processes.ask(msgspec.msgpack.encode(call), SECONDS, cancelled)
        except Ended as ended:
            raise invalid(f"the template {_problem(ended.why)}", PARAM) from ended
        except NotStarted as error:
            logger.error("chat templates of calls can't be rendered: %s", error)
            message = "no process can be started to render the call's chat template; try again later"
            raise APIError(503, message, param=PARAM, retry_after=5) from error
        return _text(*msgspec.msgpack.decode(answer))


def _text(outcome: str, text: str) -> str:
    """The text that a template became, or the error that `template_program` met instead."""
    if outcome == "option":
        raise ConfigError(text)
    if outcome == "refused":
        raise InvalidRequestError(text)
    if outcome == "limit":
        raise invalid(f"the template {text}", PARAM)
    return text


def _problem(why: str) -> str:
    """What the end of a process tells of the template."""
    if why == "time":
        return f"takes more than {SECONDS:g} s to render"
    if why == "memory":
        return f"takes more than {MEMORY / 2**30:g} GiB of memory to render"
    if why == "stack":
        return "nests too deeply"
    return f"ended the process that rendered it ({why})"
