"""Logs: one line an event, as text or as JSON, with the fields that the event has."""

from __future__ import annotations

import json
import logging
import sys
import time

from hf_paged.server.stats import RequestRecord

logger = logging.getLogger("hf_paged.server.requests")

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
        fields = "".join(f" {name}={value}" for name, value in _extra(record).items() if value is not None)
        return super().format(record) + fields


def _extra(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in vars(record).items() if name not in _KNOWN}


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


def configure(level: str, form: str) -> None:
    """Send what hf_paged and uvicorn log to stderr, in this form."""
    handler = logging.StreamHandler(sys.stderr)
    text = _Text("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(_JSON() if form == "json" else text)
    for name in ("hf_paged", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())
    logging.getLogger("uvicorn.access").disabled = True  # hf_paged.server.access has the request ids
