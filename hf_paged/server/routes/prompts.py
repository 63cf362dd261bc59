"""Messages and tools of calls, as chat templates want them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel


def plain(models: Iterable[BaseModel] | None) -> Iterator[dict[str, Any]]:
    """Messages or tools as `ModelText.render` takes them, made where they are gone through."""
    return (model.model_dump(exclude_none=True) for model in models or ())


def known_options(template: str | None, **wanted: str | None) -> dict[str, str]:
    """Those of the options that are given and that the template knows; the others could not change its text.

    Args:
        template: the chat template; None: the tokenizer chooses it, and may know all of them.
        wanted: the options, None where one isn't given.
    """
    return {
        name: value for name, value in wanted.items() if value is not None and (template is None or name in template)
    }
