"""OutputText: the same text, whether tokens come in pieces, as in the server, or one by one, as in LLM."""

from __future__ import annotations

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_paged import SamplingParams
from hf_paged.request import Request
from hf_paged.text.output import OutputText, overlap

TOKENIZER = tiny.tokenizer()
EOS = 2


@settings(max_examples=60, deadline=None)
@given(
    text=st.text("abcü€", max_size=16),
    sizes=st.lists(st.integers(1, 4), max_size=8),
    min_tokens=st.integers(0, 5),
    keep=st.booleans(),
    ends=st.booleans(),
)
def test_pieces_and_stop_checks_agree(text: str, sizes: list[int], min_tokens: int, keep: bool, ends: bool) -> None:
    params = SamplingParams(
        stop=["ab", "üa", "cc"], min_tokens=min_tokens, include_stop_str_in_output=keep, max_tokens=None
    )
    ids = TOKENIZER.encode(text, add_special_tokens=False) + [EOS] * ends
    finish = "stop" if ends else "length"
    pieces, at = OutputText(TOKENIZER, [5], params, frozenset([EOS])), 0
    for size in [*sizes, len(ids) + 1]:
        at, begin = at + size, at
        pieces.add(ids[begin:at], finish if at >= len(ids) else None)
    checked = OutputText(TOKENIZER, [5], params, frozenset([EOS]))
    request = Request("x", [5], params)
    for token in ids:
        request.token_ids.append(token)
        if len(request.token_ids) - 1 < min_tokens or (token == EOS and ends and not keep):
            continue  # the engine doesn't ask
        if checked.stop_check(request):
            break
    checked.add(request.token_ids[1 + checked.num_tokens :], finish)
    assert (pieces.text, pieces.stop, pieces.num_tokens) == (checked.text, checked.stop, checked.num_tokens)
    if pieces.stop is None:
        assert pieces.text.startswith(text)


@pytest.mark.parametrize(("text", "count"), [("", 0), ("x", 0), ("xa", 1), ("xab", 2), ("xabc", 0), ("aa", 1)])
def test_overlap(text: str, count: int) -> None:
    assert overlap(text, ("abc", "q")) == count
