"""Errors as OpenAI's clients expect them: a status, and a body that says what, where and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    431: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


CLIENT_GONE = 499  # nginx's status for it; only the logs see it
LONGEST = 1000  # characters of a message
LONGEST_PARAM = 256


class APIError(Exception):
    """Ends a call with an error body.

    Args:
        status: of HTTP.
        message: names the value, the limit and the way out.
        param: the field at fault, or None.
        code: a word for programs, or None.
        retry_after: seconds after which trying again makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error body. Of a long message the middle is left out, which is the value, and of a param the end."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        message = self.message
        if len(message) > LONGEST:
            message = f"{message[: LONGEST // 2]} … {message[3 - LONGEST // 2 :]}"
        param = None if self.param is None else self.param[:LONGEST_PARAM]
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Retry-After, where it is known."""
        return {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}


class ClientGone(Exception):
    """The client closed the connection before its answer."""


def invalid(message: str, param: str | None = None, code: str | None = None) -> APIError:
    """A 400 for what a client got wrong."""
    return APIError(400, message, param=param, code=code)


def check_model(name: str | None, names: Sequence[str]) -> None:
    """Refuse a model that isn't among the `names` served; None is any.

    Raises:
        APIError: 404.
    """
    if name is not None and name not in names:
        message = f"the model {name!r} is not served; served are {', '.join(names)}"
        raise APIError(404, message, param="model", code="model_not_found")


def check_vocabulary(ids: Sequence[int], size: int, param: str) -> None:
    """Refuse token ids that the model doesn't have; they are not negative.

    Raises:
        APIError: 400; it names the first one.
    """
    if ids and max(ids) >= size:
        wrong = next(token for token in ids if token >= size)
        raise invalid(f"token id {wrong} in the {param} is outside the vocabulary (0 to {size - 1})", param)


def ended(finish: str | None, timeout: str | None, retry_after: float | None = None) -> APIError | None:
    """The error for a sequence that was ended from outside, or None.

    Args:
        finish: its finish reason.
        timeout: the field with its deadline, if any.
        retry_after: seconds, where it waited too long.
    """
    if finish == "deadline":
        message = "the deadline of this request is over; give a longer timeout"
        return APIError(408, message, param=timeout, code="deadline_exceeded")
    if finish == "queue_timeout":
        message = "the request waited too long for its turn; try again later"
        return APIError(429, message, code="queue_timeout", retry_after=retry_after)
    if finish == "abort":
        return APIError(503, "the request was aborted: the server is shutting down", code="aborted", retry_after=5)
    return None
