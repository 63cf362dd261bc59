"""Log-probabilities over HTTP: the same for every copy of a prompt, and tokens and bytes that join to the text."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
from server.conftest import ServerProcess, events
from server.test_server import error_of

from hf_paged import LLM, SamplingParams

PROMPT = "a naïve 𝄞 café"
TOKENIZER = tiny.tokenizer()
IDS = TOKENIZER.encode(PROMPT, add_special_tokens=False)
NO_SPECIAL = {str(token): -100 for token in range(3)}
SIX = {"max_tokens": 6, "temperature": 1.0, "seed": 3, "ignore_eos": True, "logit_bias": NO_SPECIAL}


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> list[float]:
    """The log-probability of each token of the prompt but the first."""
    with LLM(str(tiny_model)) as llm:
        (output,) = llm.generate([IDS], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    return [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], IDS[1:], strict=True)]


def answer(server: ServerProcess, route: str, **body: Any) -> Any:
    got = httpx.post(f"{server.url}/v1/{route}", json={"model": "tiny", **body}, timeout=60)
    assert got.status_code == 200, got.text
    return events(got.text) if body.get("stream") else got.json()


def joined(chunks: list[Any], index: int) -> tuple[str, dict[str, list[Any]]]:
    """The text and log-probabilities that a stream of /v1/completions says of one choice."""
    text, found = "", {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    for choice in (choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index):
        text += choice["text"]
        for name, values in (choice["logprobs"] or {}).items():
            found[name] += values
    return text, found


def of_bytes(name: str) -> bytes:
    """What a token's name stands for: text, or bytes that are no whole text."""
    return bytes.fromhex(name[6:].replace("\\x", "")) if name.startswith("bytes:") else name.encode()


def check_completion(text: str, found: dict[str, list[Any]], expected: list[float] | None, top: int) -> None:
    """Names join to the text, offsets are where tokens begin, and the prompt has its log-probabilities."""
    names = [of_bytes(name) for name in found["tokens"]]
    assert b"".join(names).decode(errors="replace") == text  # special tokens of a prompt are part of it
    whole = codecs.getincrementaldecoder("utf-8")
    starts = [len(whole("replace").decode(b"".join(names[:i]))) for i in range(len(names))]
    assert found["text_offset"] == starts
    for name, value, best in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        if value is not None:
            assert top <= len(best) <= top + 1
            assert best.get(name, value) == value
    if expected is not None:
        assert found["token_logprobs"][: len(IDS)] == [None, *(pytest.approx(one, abs=1e-4) for one in expected)]
        assert None not in found["token_logprobs"][1:]


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_completions(tiny_server: ServerProcess, expected: list[float], n: int, echo: bool, stream: bool) -> None:
    body = {"prompt": PROMPT, "n": n, "echo": echo, "logprobs": 2, "stream": stream, **SIX}
    got = answer(tiny_server, "completions", **body)
    for index in range(n):
        choice = None if stream else got["choices"][index]
        text, found = (choice["text"], choice["logprobs"]) if choice else joined(got, index)
        assert len(found["tokens"]) == SIX["max_tokens"] + echo * len(IDS)
        assert text.startswith(PROMPT) or not echo
        check_completion(text, found, expected if echo else None, 2)


@pytest.mark.parametrize("prompts", [["xyz", PROMPT, PROMPT], [[65, 66], IDS, IDS]])
def test_several_prompts_of_several_copies(
    tiny_server: ServerProcess, expected: list[float], prompts: list[Any]
) -> None:
    body = {"prompt": prompts, "n": 2, "echo": True, "logprobs": 0, **SIX}
    got = answer(tiny_server, "completions", **body)
    for choice in got["choices"]:
        check_completion(choice["text"], choice["logprobs"], expected if choice["index"] >= 2 else None, 0)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_prompt_logprobs(tiny_server: ServerProcess, route: str, n: int) -> None:
    asked = {"prompt": PROMPT} if route == "completions" else {"messages": [{"role": "user", "content": PROMPT}]}
    got = answer(tiny_server, route, **asked, n=n, prompt_logprobs=1, **SIX)
    found = [choice["prompt_logprobs"] for choice in got["choices"]] if "prompt_logprobs" not in got else None
    found = found or [got["prompt_logprobs"]]
    for one in found:
        assert one == found[0]
        assert one[0] is None
        assert all(one[1:])
        assert len(one) == got["usage"]["prompt_tokens"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", [None, ["é", "𝄞"]])
def test_bytes_of_a_chat_join_to_its_text(tiny_server: ServerProcess, stream: bool, stop: Any) -> None:
    wanted = "né𝄞."
    spelled = TOKENIZER.encode(wanted, add_special_tokens=False)
    body = {
        "messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 20, "stream": stream,
        "max_tokens": 40, "temperature": 1.0, "seed": 5, "ignore_eos": True, "stop": stop,
        "logit_bias": {str(token): 100 for token in set(spelled)},
    }  # fmt: skip
    got = answer(tiny_server, "chat/completions", **body)
    choices = [choice for chunk in got for choice in chunk["choices"]] if stream else got["choices"]
    text = "".join(choice["delta" if stream else "message"].get("content") or "" for choice in choices)
    content = [one for choice in choices for one in (choice["logprobs"] or {}).get("content", [])]
    whole = b"".join(bytes(one["bytes"]) for one in content).decode(errors="replace")
    assert whole.startswith(text) if stop else whole == text
    for one in content:
        assert of_bytes(one["token"]) == bytes(one["bytes"])
        assert len({bytes(best["bytes"]) for best in one["top_logprobs"]} - {b""}) >= 18
    assert any(one["token"].startswith("bytes:") for one in content)


def test_special_tokens_of_an_echoed_prompt_are_text_of_it(tiny_server: ServerProcess) -> None:
    body = {"prompt": [1, *IDS], "echo": True, "logprobs": 1, **SIX}
    choice = answer(tiny_server, "completions", **body)["choices"][0]
    assert choice["text"].startswith("<s>" + PROMPT)
    assert choice["logprobs"]["text_offset"][:3] == [0, 3, 4]
    check_completion(choice["text"], choice["logprobs"], None, 1)


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_nothing_to_draw_is_refused(tiny_server: ServerProcess, route: str) -> None:
    asked = {"prompt": "x"} if route == "completions" else {"messages": [{"role": "user", "content": "x"}]}
    token = TOKENIZER.encode("a", add_special_tokens=False)[0]
    for given in (
        {"allowed_token_ids": [token], "bad_words": ["a"]},
        {"allowed_token_ids": [2], "min_tokens": 3},
        {"allowed_token_ids": [token], "stop_token_ids": [token], "min_tokens": 1},
    ):
        got = httpx.post(f"{tiny_server.url}/v1/{route}", json={"model": "tiny", **asked, **given}, timeout=60)
        assert (got.status_code, error_of(got)["message"][:21]) == (400, "no token may be drawn")
    for bias in ("1e39", "-1e39", "1e400", '"x"'):
        content = json.dumps({"model": "tiny", **asked, "logit_bias": {"5": 0}}).replace("0}", bias + "}")
        headers = {"Content-Type": "application/json"}
        got = httpx.post(f"{tiny_server.url}/v1/{route}", content=content, headers=headers, timeout=60)
        assert got.status_code == 400, got.text
        assert error_of(got)["param"].startswith("logit_bias")
