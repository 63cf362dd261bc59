"""Bad words: texts -> the token sequences that must not be produced."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from hf_paged.errors import InvalidRequestError

_IGNORED = frozenset({"Mn", "Zs", "Zl", "Zp", "Cc", "Cf"})


def banned_ids(tokenizer: Any, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The token sequences of bad words, as they stand at the start of a text and after a space.

    A word's own leading white space stays with it where that is all it is, or else is one of the two forms. Sequences
    that don't spell the word, such as the lone space that some tokenizers put before it, are left out. A tokenizer may
    spell it in lower case, without accents, or with spaces between its parts.

    Raises:
        InvalidRequestError: the tokenizer has no tokens for a word.
    """
    found: set[tuple[int, ...]] = set()
    for word in words:
        bare = word.lstrip() or word
        encoded = [_encode(tokenizer, form) for form in dict.fromkeys((bare, f" {bare}", word))]
        if not word.strip():  # tokenizers put a space of their own before it, unless there is text
            before, both = _encode(tokenizer, "a"), _encode(tokenizer, f"a{word}")
            encoded.append(both[len(before) :] if both[: len(before)] == before else ())
        spelled = {ids for ids in encoded if ids and _spells(tokenizer, ids, bare)}
        if not spelled:
            raise InvalidRequestError(f"bad_words: the tokenizer has no tokens for {word!r}")
        found |= spelled
    return tuple(sorted(found))


def _spells(tokenizer: Any, ids: Sequence[int], word: str) -> bool:
    text = tokenizer.decode(list(ids), skip_special_tokens=False)
    return word in text or (bool(_folded(word)) and _folded(word) in _folded(text))


def _folded(text: str) -> str:
    """The text without what normalisers of tokenizers change: case, accents, white space and control characters."""
    letters = unicodedata.normalize("NFKD", text.casefold())
    return "".join(letter for letter in letters if unicodedata.category(letter) not in _IGNORED)


def _encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))
