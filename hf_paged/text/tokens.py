"""The text and the bytes of single tokens, as log-probabilities report them."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from typing import Any

UNKNOWN = "�"  # what bytes that are no whole character decode to
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # a token of one byte in tokenizers with byte fallback
_ANCHORS = ("a", "0", "the", ".")  # texts of a token, one of which is in nearly every vocabulary


class TokenTexts:
    """What each token of a vocabulary adds to a text. Everything is looked up once.

    `decode([id])` is not that: decoders strip the space that a text begins with, and a token that holds a part of a
    character decodes to U+FFFD. So a token is decoded behind another one, and its bytes are read from its name.

    Args:
        tokenizer: a Transformers tokenizer.

    Attributes:
        special: ids that `skip_special_tokens` skips.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {token for token, content in added.items() if content.special}
        self.special = frozenset(special.union(getattr(tokenizer, "all_special_ids", ())))
        self._anchor = self._find_anchor()
        self._bytes: dict[tuple[int, bool], bytes] = {}

    def bytes_of(self, token: int, *, opens: bool = False) -> bytes:
        """The UTF-8 bytes that the token adds to a text. Those of an output's tokens join to the output's text.

        Args:
            opens: the text begins with this token; decoders may strip its leading space.
        """
        key = token, opens
        if key not in self._bytes:
            text = self._decode([token]) if opens else self._behind_another(token)
            raw = self._raw(token) if UNKNOWN in text else None
            self._bytes[key] = text.encode("utf-8", "replace") if raw is None else raw
        return self._bytes[key]

    def name(self, token: int) -> str:
        """The token's text, as `named` has it."""
        return named(self.bytes_of(token))

    def bytes_of_prompt(self, tokens: Sequence[int], text: str) -> list[bytes]:
        """What each token of a prompt adds to the prompt's text; special tokens that the text lacks add nothing."""
        found: list[bytes] = []
        at = TextOffset()
        for token in tokens:
            piece = self.bytes_of(token, opens=at.characters == 0)
            if token in self.special and not text.startswith(named(piece), at.characters):
                piece = b""
            at.add(piece)
            found.append(piece)
        return found

    def _find_anchor(self) -> int | None:
        for text in _ANCHORS:
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            if ids and ids[-1] not in self.special and self._decode(ids[-1:]).strip() == text:
                return int(ids[-1])
        return None

    def _behind_another(self, token: int) -> str:
        if self._anchor is None:
            return self._decode([token])
        before, both = self._decode([self._anchor]), self._decode([self._anchor, token])
        return both[len(before) :] if both.startswith(before) else self._decode([token])

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def _raw(self, token: int) -> bytes | None:
        """The bytes that the token's name in the vocabulary stands for, or None: it is no name of bytes."""
        name = self.tokenizer.convert_ids_to_tokens(token)
        if isinstance(name, bytes):
            return name
        if not isinstance(name, str):
            return None
        if byte := _BYTE.fullmatch(name):
            return bytes([int(byte[1], 16)])
        values = [_BYTE_LEVEL.get(character) for character in name]
        return None if None in values else bytes(value for value in values if value is not None)


class TextOffset:
    """Counts the characters of a text that comes in pieces of bytes; characters may be divided between pieces.

    Attributes:
        characters: whole ones so far.
    """

    def __init__(self) -> None:
        self.characters = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, piece: bytes) -> None:
        """Advance past a piece."""
        self.characters += len(self._decoder.decode(piece))


def named(piece: bytes) -> str:
    r"""Bytes as text, or, where they are no whole characters, in OpenAI's form: `bytes:\xe2\x82`."""
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _byte_level() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies (GPT-2's `bytes_to_unicode`).

    Printable bytes of Latin-1 stand for themselves, the others for the characters from U+0100 on, in their order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level()
