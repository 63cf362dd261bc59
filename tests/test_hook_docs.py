"""Every hook is documented in one form, and the migration guide lists exactly the hooks there are."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_paged import hookspecs

PARTS = ("When", "Arguments", "Return", "Cost", "Failure")
PAGE = Path(__file__).resolve().parent.parent / "migration_guide" / "plugins.md"
HOOKS: dict[str, Callable[..., Any]] = {
    name: function for name, function in vars(hookspecs).items() if hasattr(function, f"{hookspecs.PROJECT}_spec")
}


def test_there_are_hooks() -> None:
    assert len(HOOKS) >= 14


def test_nothing_else_is_public() -> None:
    functions = {name for name, value in vars(hookspecs).items() if inspect.isfunction(value)}
    assert functions == set(HOOKS)


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_is_documented_in_the_one_form(name: str) -> None:
    text = inspect.getdoc(HOOKS[name]) or ""
    assert re.match(r"[A-Z][^\n]*\.\n\n", text), f"{name}: a line that says what it is for, then an empty one"
    assert tuple(re.findall(r"^(\w+): ", text, re.MULTILINE)) == PARTS, f"{name}: {', '.join(PARTS)}, in this order"
    parts = dict(re.findall(r"^(\w+): (.*?)(?=^\w+: |\Z)", text, re.MULTILINE | re.DOTALL))
    for part in PARTS:
        assert parts[part].rstrip().endswith("."), f"{name}: {part} is not a sentence"
    for argument in inspect.signature(HOOKS[name]).parameters:
        assert re.search(rf"\b{argument}\b", parts["Arguments"]), f"{name}: {argument} is not documented"


@pytest.mark.parametrize("name", HOOKS)
def test_what_a_hook_returns_is_documented(name: str) -> None:
    first = getattr(HOOKS[name], f"{hookspecs.PROJECT}_spec")["firstresult"]
    nothing = "Return: nothing." in (inspect.getdoc(HOOKS[name]) or "")
    assert nothing != bool(first), f"{name}: a hook of which the first result counts returns something, others nothing"


def test_the_guide_lists_exactly_these_hooks() -> None:
    # Rows of the table of hooks begin with the hook and its arguments: | `name(argument, …)` | …
    rows = re.findall(r"^\| `(\w+)\(([^)]*)\)` \|", PAGE.read_text(), re.MULTILINE)
    listed = {name: tuple(filter(None, arguments.split(", "))) for name, arguments in rows}
    assert len(rows) == len(listed), "a hook is listed twice"
    assert listed == {name: tuple(inspect.signature(hook).parameters) for name, hook in HOOKS.items()}


def test_the_guide_has_an_example_of_every_hook() -> None:
    code = "\n".join(re.findall(r"^```python[^\n]*\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL))
    missing = [name for name in HOOKS if not re.search(rf"def {name}\(", code)]
    assert not missing
