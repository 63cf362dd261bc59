"""Parameters of OpenAI's API that this server refuses, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_STORED = "nothing is stored here; send the whole conversation as input"

# By name. A parameter that is a field of a route's request is honoured, or can't change an answer: see
# `common.Accepted`. A test compares both with the parameters of the openai package.
REASONS = {
    "access_programs": "this server has none",
    "audio": "answers are text; leave it out",
    "background_options": "nothing runs in the background; leave it out",
    "context_management": "no conversation is compacted here; send one that fits",
    "conversation": _STORED,
    "function_call": "it was replaced by tool_choice; give that",
    "functions": "they were replaced by tools; give those",
    "moderation": "this server moderates nothing; leave it out",
    "previous_response_id": _STORED,
    "prompt": "prompts are for /v1/completions, and no templates are stored here; send messages, or input",
    "suffix": "text is only continued at its end; leave it out",
    "web_search_options": "this server can't search the web; leave it out",
}

# Values of them that ask for nothing, which clients send for what they don't use.
_NOTHING: dict[str, tuple[Any, ...]] = {
    "access_programs": ({},),
    "background_options": ({},),
    "context_management": ([],),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "suffix": ("",),
}


def asks_for_nothing(name: str, body: Mapping[str, Any]) -> bool:
    """Whether a parameter of a call is refused in general, and can't change an answer with the value it has."""
    if name == "function_call" and body.get("tools"):
        return False  # it could mean that they must not be called
    return body[name] in _NOTHING.get(name, ())
