"""StructuredOutputs -> a grammar that llguidance takes, as text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llguidance import LLMatcher, LLParserLimits, grammar_from

from hf_paged import InvalidRequestError, StructuredOutputs

# Between two tokens of JSON: enough for an indented line, not for a model that never stops writing blanks.
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,40}"
# A message about what a user asked for must not hold the parser's state.
LIMITS = LLParserLimits(verbose_errors=False)
LONGEST_PROBLEM = 300  # characters of what llguidance says; a panic of its parser says thousands


def grammar_of(wanted: StructuredOutputs) -> str:
    """The grammar of what is wanted. What is wrong inside it is found when it is compiled.

    Raises:
        InvalidRequestError: it is none: a schema that isn't JSON, a grammar that isn't GBNF.
    """
    try:
        return _translate(wanted)
    except (ValueError, RecursionError) as error:
        raise refused(kind_of(wanted), str(error)) from error


def kind_of(wanted: StructuredOutputs) -> str:
    """Which of the fields is set."""
    return next(name for name, value in vars(wanted).items() if value not in (None, False))


def refused(kind: str, problem: str) -> InvalidRequestError:
    """The error for a grammar that llguidance doesn't take, in its words, which name what is wrong or unsupported."""
    words = " ".join(problem.split())[:LONGEST_PROBLEM].replace(
        "Unimplemented keys:", "these keywords of JSON schema aren't supported:"
    )
    return InvalidRequestError(f"structured_outputs.{kind} can't be kept to: {words}")


def _translate(wanted: StructuredOutputs) -> str:
    if wanted.json is not None:
        return _json_schema(_parsed(wanted.json))
    if wanted.json_object:
        return _json_schema({"type": "object"})
    if wanted.regex is not None:
        return LLMatcher.grammar_from_regex(wanted.regex)
    if wanted.choice is not None:
        return grammar_from("choice", json.dumps(list(wanted.choice)))
    assert wanted.grammar is not None  # StructuredOutputs has exactly one of them
    return grammar_from("grammar", wanted.grammar)


def _parsed(schema: Mapping[str, Any] | str) -> dict[str, Any]:
    found = json.loads(schema) if isinstance(schema, str) else dict(schema)
    if not isinstance(found, dict):
        raise ValueError(f"a schema is an object, got {json.dumps(found)[:80]}")
    return found


def _json_schema(schema: dict[str, Any]) -> str:
    return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": WHITESPACE})
