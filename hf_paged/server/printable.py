"""Text of others on a terminal or in a log: nothing in it moves the cursor, begins a line or turns the direction."""

from __future__ import annotations


def printable(text: str, keep: str = "") -> str:
    """The text with escapes for what is no character to print, but for those in `keep`."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in keep else one.encode("unicode_escape").decode() for one in text)
