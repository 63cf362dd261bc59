"""What single tokens add to a text: names and bytes that join to it, for every kind of tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
import vocabularies
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_paged import SamplingParams
from hf_paged.text.detokenizer import Detokenizer
from hf_paged.text.tokens import TextOffset, TokenTexts, named

KINDS = sorted(vocabularies.ALL)
BYTE_KINDS = ["byte_level", "stripping"]  # that have a token for every byte


def texts_of(kind: str) -> TokenTexts:
    return TokenTexts(vocabularies.ALL[kind]())


def detokenized(tokenizer: Any, prompt: list[int], ids: list[int]) -> str:
    detokenizer = Detokenizer(tokenizer, prompt, SamplingParams())
    return "".join(map(detokenizer.add, ([token] for token in ids))) + detokenizer.add([], last=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["the cat", ""])
def test_bytes_join_to_the_text_of_an_output(kind: str, prompt: str) -> None:
    texts = texts_of(kind)
    before = [1, *texts.tokenizer.encode(prompt, add_special_tokens=False)]
    for sentence in ("sat on the mat", "a  naïve   café", "Hello", *vocabularies.SENTENCES):
        ids = texts.tokenizer.encode(sentence, add_special_tokens=False)
        opens = Detokenizer(texts.tokenizer, before, SamplingParams()).opens
        assert opens == (not prompt)
        joined = b"".join(texts.bytes_of(token, opens=opens and number == 0) for number, token in enumerate(ids))
        assert joined.decode() == detokenized(texts.tokenizer, before, ids)


@pytest.mark.parametrize("kind", BYTE_KINDS)
@settings(max_examples=50, deadline=None)
@given(text=st.text("aé€😀 ï", min_size=1, max_size=8))
def test_parts_of_characters(kind: str, text: str) -> None:
    texts = texts_of(kind)
    before = texts.tokenizer.encode("the", add_special_tokens=False)
    ids = texts.tokenizer.encode(text, add_special_tokens=False)
    joined = b"".join(texts.bytes_of(token) for token in ids)
    assert joined.decode() == detokenized(texts.tokenizer, before, ids)
    assert "�" not in "".join(texts.name(token) for token in ids)


@pytest.mark.parametrize("kind", BYTE_KINDS)
def test_names_of_parts_of_characters_are_openais_and_differ(kind: str) -> None:
    texts = texts_of(kind)
    ids = texts.tokenizer.encode("😀", add_special_tokens=False)
    ids = [token for token in ids if texts.bytes_of(token).strip()]
    assert [texts.name(token) for token in ids] == [r"bytes:\xf0", r"bytes:\x9f", r"bytes:\x98", r"bytes:\x80"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_leading_space_is_kept(kind: str) -> None:
    texts = texts_of(kind)
    ids = texts.tokenizer.encode("a cat", add_special_tokens=False)
    assert "".join(texts.name(token) for token in ids).endswith("a cat")


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_have_their_own_name(kind: str) -> None:
    texts = texts_of(kind)
    assert texts.special == {0, 1, 2}
    assert [texts.name(token).strip() for token in (0, 1, 2)] == vocabularies.SPECIAL
    assert texts.name(100_000) == ""  # models have more rows than tokenizers have ids


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_a_prompt_join_to_its_text(kind: str) -> None:
    texts = texts_of(kind)
    for text in vocabularies.SENTENCES:
        ids = texts.tokenizer.encode(text, add_special_tokens=False)
        for prompt, whole in (([1, *ids], text), ([1, 1, *ids], f"<s>{text}"), (ids, text)):
            pieces = texts.bytes_of_prompt(prompt, whole)
            assert b"".join(pieces).decode().replace(" ", "") == whole.replace(" ", "")
            assert len(pieces) == len(prompt)
    assert texts.bytes_of_prompt([1, *ids], text)[0] == b""
    assert texts.bytes_of_prompt([1, *ids], f"<s>{text}")[0].strip() == b"<s>"


def test_offsets_count_whole_characters() -> None:
    offset = TextOffset()
    seen = []
    for piece in (b"a", b"\xf0", b"\x9f\x98", b"\x80", b"", b"b"):
        seen.append(offset.characters)
        offset.add(piece)
    assert seen == [0, 1, 1, 1, 2, 2]
    assert offset.characters == 3


def test_names_of_bytes() -> None:
    assert [named(piece) for piece in (b"ab", "€".encode(), b"\xe2\x82", b"a\xff")] == [
        "ab",
        "€",
        r"bytes:\xe2\x82",
        r"bytes:\x61\xff",
    ]


class Slow:
    """A tokenizer of another library: names are bytes, and nothing tells which tokens are special."""

    names = (b"a", b" b", b"\xe2", b"\x82\xac")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [self.names.index(text.encode())] if text.encode() in self.names else []

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return b"".join(self.names[token] for token in ids).decode("utf-8", "replace")

    def convert_ids_to_tokens(self, token: int) -> bytes:
        return self.names[token]


def test_tokenizers_whose_names_are_bytes() -> None:
    texts = TokenTexts(Slow())
    assert [texts.bytes_of(token) for token in range(4)] == list(Slow.names)
    assert texts.special == frozenset()
