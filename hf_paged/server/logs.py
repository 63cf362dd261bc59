"""Logs: one line an event, as text or as JSON, with the fields that the event has.

Paths, users and request ids are what clients sent. None of their characters begins a line, and none is sent to a
terminal as a control character.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time

from hf_paged.server.printable import printable
from hf_paged.server.stats import RequestRecord

logger = logging.getLogger("hf_paged.server.requests")

LONGEST = 256  # characters of a field
_KNOWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}


class _JSON(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={_word(value)}" for name, value in _extra(record).items() if value is not None)
        head = f"{self.formatTime(record)} {record.levelname} {record.name}: {record.getMessage()}{fields}"
        trace = self.formatException(record.exc_info).splitlines() if record.exc_info else []
        return "\n".join([printable(head), *(f"    {printable(line)}" for line in trace)])


def _extra(record: logging.LogRecord) -> dict[str, object]:
    fields = {name: value for name, value in vars(record).items() if name not in _KNOWN}
    return {name: _short(value) if isinstance(value, str) else value for name, value in fields.items()}


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _word(value: object) -> str:
    """A value that is one word: in quotes where it could be taken for several fields."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[\s"=]', text) else text


class RequestLog:
    """A listener of ServerStats that logs each sequence when it ends."""

    def request_finished(self, record: RequestRecord) -> None:
        """Log it."""
        names = ("client_id", "request_id", "endpoint", "user", "prompt_tokens", "cached_tokens", "output_tokens")
        fields: dict[str, object] = {name: getattr(record, name) for name in names}
        fields |= {"finish_reason": record.finish_reason, "replica": record.replica, "resumed": record.resumed}
        for name, seconds in (("ttft", record.time_to_first_token), ("latency", record.latency)):
            fields[name] = None if seconds is None else round(seconds, 4)
        logger.info("finished", extra=fields)


def formatter(form: str) -> logging.Formatter:
    """What writes an event as text or as JSON."""
    return _JSON() if form == "json" else _Text()


def configure(level: str, form: str) -> None:
    """Send what hf_paged and uvicorn log to stderr, in this form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(form))
    for name in ("hf_paged", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())
    logging.getLogger("uvicorn.access").disabled = True  # hf_paged.server.access has the request ids
