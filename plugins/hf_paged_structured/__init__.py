"""Structured output over llguidance: what a request's `params.structured_outputs` asks for is all that it can write.

A JSON schema, a regular expression, a choice or a grammar becomes a matcher, which knows for each state the tokens that
may follow. A logits processor drops all others, end of sequence included until the output is complete. Masks are
computed in a thread of their own from the moment a token is known, while the next forward runs.

llguidance is an optional library: `pip install '.[structured]'` in a clone of hf_paged.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from hf_paged import ConfigError, hookimpl
from hf_paged.protocols import Constraint, LogitsProcessor
from hf_paged.request import Request


@hookimpl
def register_logits_processors(register: Callable[[LogitsProcessor], None], config: Any) -> None:
    """Hand over the processor; it concerns none but the requests that this plugin constrained."""
    if _installed():
        from hf_paged_structured.processor import StructuredProcessor

        register(StructuredProcessor())


@hookimpl
def constrain_request(request: Request, tokenizer: Any) -> Constraint | None:
    """A matcher for the request, compiled or taken from those compiled before."""
    if not _installed():
        raise ConfigError("structured_outputs needs llguidance: pip install '.[structured]' in a clone of hf_paged")
    from hf_paged_structured.compile import constraint_for

    return constraint_for(request, tokenizer)


def _installed() -> bool:
    return find_spec("llguidance") is not None
