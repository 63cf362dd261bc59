"""The ids of bad words: words of white space, of several tokens, with and without a leading space."""

from __future__ import annotations

import pytest
import tiny
import vocabularies
from tokenizers import Tokenizer, normalizers, trainers

from hf_paged.errors import InvalidRequestError
from hf_paged.text.bad_words import banned_ids

TOKENIZER = tiny.tokenizer()
SPACE = tuple(TOKENIZER.encode(" ", add_special_tokens=False))


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("word", ["\n", "\n\n", "\t", "\r\n", " \n", "\u3000"])
def test_white_space_bans_itself_and_not_the_space(word: str) -> None:
    banned = banned_ids(TOKENIZER, [word])
    assert ids(word) in banned
    assert SPACE not in banned
    assert all(word in TOKENIZER.decode(list(sequence)) for sequence in banned)


@pytest.mark.parametrize("word", ["a", " a", "cat", "  cat", "é", "two words", "\ncat"])
def test_a_word_is_banned_at_the_start_and_after_a_space(word: str) -> None:
    banned = banned_ids(TOKENIZER, [word])
    assert {ids(word.lstrip()), ids(f" {word.lstrip()}")} <= set(banned)
    assert SPACE not in banned


@pytest.mark.parametrize("kind", sorted(vocabularies.ALL))
def test_each_sequence_spells_the_word(kind: str) -> None:
    tokenizer = vocabularies.ALL[kind]()
    for word in ("cat", " cat", "the"):
        banned = banned_ids(tokenizer, [word])
        assert banned
        assert all(word.strip() in tokenizer.decode(list(sequence)) for sequence in banned)


def test_white_space_behind_text_where_the_tokenizer_adds_a_space() -> None:
    tokenizer = vocabularies.stripping()
    assert (tokenizer.convert_tokens_to_ids("<0x0A>"),) in banned_ids(tokenizer, ["\n"])


@pytest.mark.parametrize("word", ["Cat", "THE MAT", "Café", "they,said"])
def test_a_word_that_the_tokenizer_spells_otherwise(word: str) -> None:
    """As BERT's uncased models: without case and accents, with spaces around commas."""
    inner = Tokenizer.from_str(vocabularies.word_piece().backend_tokenizer.to_str())
    inner.normalizer = normalizers.BertNormalizer()
    tokenizer = vocabularies.trained(inner, trainers.WordPieceTrainer(special_tokens=vocabularies.SPECIAL))
    assert tuple(tokenizer.encode(word, add_special_tokens=False)) in banned_ids(tokenizer, [word])
    with pytest.raises(InvalidRequestError, match="no tokens for 'cat漢'"):
        banned_ids(tokenizer, ["cat漢"])


def test_a_word_without_tokens_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"no tokens for '\\n'"):
        banned_ids(vocabularies.word_piece(), ["\n"])
