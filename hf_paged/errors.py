"""Every error that hf_paged raises on purpose. Each message names the value, the limit and the way out."""

from __future__ import annotations


class HFPagedError(Exception):
    """The base of all of them."""


class InvalidRequestError(HFPagedError, ValueError):
    """A request that can't be served as it stands: an empty prompt, an id outside the vocabulary, too many tokens."""


class ConfigError(HFPagedError, ValueError):
    """An option whose value is unknown, out of range, or contradicts another."""


class UnsupportedModelError(HFPagedError):
    """A model that can't be carried on the paged engine; the message says why."""


class UnsupportedCallError(HFPagedError):
    """A `generate()` call that can't be carried on the paged engine, under `on_unsupported="error"`."""


class PluginError(HFPagedError):
    """A plugin that raised while it was set up, or that registers something twice; the message names the plugin."""


class EngineClosedError(HFPagedError, RuntimeError):
    """The engine was used after it was closed."""


class RequestFailedError(HFPagedError, RuntimeError):
    """One of the prompts of an `LLM` call failed, under `raise_on_error=True`. The cause is its own error.

    Attributes:
        index: of the prompt in the call.
    """

    def __init__(self, index: int, cause: BaseException) -> None:
        super().__init__(f"prompt {index}: {first_line(cause)}")
        self.index = index


class RequestAbortedError(HFPagedError, RuntimeError):
    """The request was aborted before it finished."""


class RequestRejectedError(HFPagedError, RuntimeError):
    """A plugin's `admit_request` turned the request away.

    Attributes:
        retry_after: seconds after which trying again makes sense, or None.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for messages of one line: compilers put pages behind it."""
    return (str(error).strip().splitlines() or ["no message"])[0][:300]


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one on the way to it, says that the memory ran out: libraries have errors of their own."""
    while error is not None:
        named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's, without torch
        if named or "out of memory" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False
